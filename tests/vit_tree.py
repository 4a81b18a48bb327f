"""A tree of parameters with the names and the layouts of the ViT, small enough for tests of the optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

DEPTH, WIDTH = 3, 4


def stacked_params(seed: int = 0) -> dict:
    """Parameters as `nn.scan` stacks them: under `blocks`, with a leading axis of layers."""
    shapes = {
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
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [rng.normal(size=shape).astype(np.float32) for shape in leaves])


def to_loop(stacked: dict) -> dict:
    """The same parameters as the loop names them: `block_0`, `block_1`, and so on."""
    loop = {name: module for name, module in jax.device_get(stacked).items() if name != "blocks"}
    return loop | {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked["blocks"]) for i in range(DEPTH)}


def gradients(params: dict, step: int) -> dict:
    return jax.tree.map(lambda p: jnp.cos((3.0 + step) * p), params)


def train(tx: optax.GradientTransformation, params: dict, steps: int = 2) -> tuple[dict, optax.OptState]:
    """Some updates with gradients that depend on the parameters; the final parameters and state."""

    @jax.jit
    def update(params, state, step):
        updates, state = tx.update(gradients(params, step), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for step in range(steps):
        params, state = update(params, state, float(step))
    return jax.device_get((params, state))
