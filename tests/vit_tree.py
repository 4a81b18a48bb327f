"""A tree of parameters with the names and the layouts of the ViT, small enough for tests of the optimiser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

DEPTH, WIDTH = 3, 4

# These tests compile many small programs and run each once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def full_params() -> dict:
    """Parameters of every kind, as `nn.scan` stacks them: under `blocks`, with a leading axis of layers."""
    return _normal(FULL, seed=0)


def stacked_params(seed: int = 0) -> dict:
    """The same for tests that compile an update: few parameters, so that it takes little time."""
    return _normal(SMALL, seed)


FULL = {
    "patch_embed": {"kernel": (12, WIDTH), "bias": (WIDTH,)},
    "posemb": {"table": (5, WIDTH)},
    "cls_token": {"token": (1, WIDTH)},
    "blocks": {
        "norm1": {"scale": (DEPTH, WIDTH)},
        "attention": {
            "query": {"kernel": (DEPTH, WIDTH, 2, 3), "bias": (DEPTH, 2, 3)},
            "out": {"kernel": (DEPTH, 2, 3, WIDTH), "bias": (DEPTH, WIDTH)},
        },
        "mlp": {"fc1": {"kernel": (DEPTH, WIDTH, 6)}, "fc2": {"kernel": (DEPTH, 6, WIDTH)}},
    },
    "norm": {"scale": (WIDTH,)},
    "head": {"kernel": (WIDTH, 5), "bias": (5,)},
}

SMALL = {
    "patch_embed": {"kernel": (12, WIDTH)},
    "cls_token": {"token": (1, WIDTH)},
    "blocks": {
        "norm1": {"scale": (DEPTH, WIDTH)},
        "attention": {"query": {"kernel": (DEPTH, WIDTH, 2, 3)}, "out": {"kernel": (DEPTH, 2, 3, WIDTH)}},
        "mlp": {"fc1": {"kernel": (DEPTH, WIDTH, 6)}},
    },
    "head": {"kernel": (WIDTH, 5), "bias": (5,)},
}


def _normal(shapes: dict, seed: int) -> dict:
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [rng.normal(size=shape).astype(np.float32) for shape in leaves])


def to_loop(stacked: dict) -> dict:
    """The same parameters as the loop names them: `block_0`, `block_1`, and so on."""
    loop = {name: module for name, module in jax.device_get(stacked).items() if name != "blocks"}
    return loop | {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked["blocks"]) for i in range(DEPTH)}


def gradients(params: dict, step: int) -> dict:
    return jax.tree.map(lambda p: jnp.cos((3.0 + jnp.asarray(step, jnp.float32)) * p), params)


def train(tx: optax.GradientTransformation, params: dict, steps: int = 2) -> tuple[dict, optax.OptState]:
    """Some updates with gradients that depend on the parameters; the final parameters and state."""

    return jax.device_get(quick_jit(lambda params: unrolled(tx, params, steps))(params))


def unrolled(tx: optax.GradientTransformation, params: dict, steps: int) -> tuple[dict, optax.OptState]:
    """`train` for use inside jit; the state has to keep its structure and dtypes, else the loop refuses it."""

    def update(step, carry):
        params, state = carry
        updates, state = tx.update(gradients(params, step), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    return jax.lax.fori_loop(0, steps, update, (params, tx.init(params)))
