"""A ViT that compiles in no time, its parameters and inputs, and what tests ask of a model and of its program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from vit_flax.models import ViT


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from all_equations(inner)


TINY = dict(num_classes=5, patch_size=4, width=16, depth=2, mlp_dim=24, num_heads=2)
B, H, W, L, D = 3, 8, 12, 2, 16
GRID = (2, 3)
N = 6  # patches
EVERYTHING = dict(  # every optional part at once
    pool="map",
    registers=2,
    class_token=True,
    dist_token=True,
    pre_norm=True,
    representation_size=8,
    mlp="swiglu",
    mlp_norm=True,
    qk_norm=True,
    qkv_bias="qv",
    patch_bias=False,
    layer_scale=0.1,
    rope="eva",
)


KEY = partial(jax.random.key, impl="rbg")  # compiles faster than the default


def tiny(**fields) -> ViT:
    return ViT(**{**TINY, **fields})


def random_params(model: ViT, seed: int = 0) -> dict:
    """Parameters in which nothing is zero or one by initialisation; made without compiling anything."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images())["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def images(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (B, H, W, 3)), jnp.float32)


def forward(model: ViT, **kwargs):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, train=False, **kwargs))


def loss_and_gradients(model: ViT):
    """((loss, (logits, out)), gradients) of a loss that reads every token."""

    def loss(params, x):
        logits, out = model.apply({"params": params}, x, train=False)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(jnp.cos(out["encoded"].astype(jnp.float32))), (logits, out)

    return jax.value_and_grad(loss, has_aux=True)


def assert_close(actual, expected, tol=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(e, np.float32), rtol=tol, atol=tol)


def flat(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def count(jaxpr, primitive: str) -> int:
    """Number of equations with this primitive, in a program and all programs in it (the body of a scan counts once)."""
    own = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    inner = (value for equation in jaxpr.eqns for value in jax.tree.leaves([*equation.params.values()]))
    return own + sum(count(getattr(value, "jaxpr", value), primitive) for value in inner if hasattr(value, "eqns"))


def training_forward(model: ViT):
    def run(params, x, seed, **kwargs):
        return model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(seed)}, **kwargs)

    return jax.jit(run)
