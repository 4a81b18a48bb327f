import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_flax.optim import make_optimizer

DEPTH, WIDTH = 3, 4


@pytest.fixture
def params(key) -> dict:
    """A ViT in miniature, with the stacked blocks of the scan."""
    shapes = {
        "patch_embed": {"kernel": (12, WIDTH), "bias": (WIDTH,)},
        "posemb": {"table": (5, WIDTH)},
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
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, s) for k, s in zip(keys, leaves)])


def gradients(params: dict, step: int) -> dict:
    return jax.tree.map(lambda p: jnp.cos((3.0 + step) * p), params)


def run(params, steps=2, **section):
    """The parameters after some updates with gradients that depend on the parameters."""
    tx = make_optimizer(
        **{"total_steps": 10, "schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.0} | section
    )
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_two_steps_by_hand(params):
    lr, wd, b1, b2, eps = 0.1, 0.3, 0.8, 0.95, 1e-3
    got = run(params, name="adamw", learning_rate=lr, weight_decay=wd, b1=b1, b2=b2, eps=eps)

    def by_hand(p, decays):
        p = np.asarray(p, np.float64)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t in (1, 2):
            g = np.cos((3.0 + t - 1) * p)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            p = p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + wd * decays * p)
        return p

    np.testing.assert_allclose(got["head"]["kernel"], by_hand(params["head"]["kernel"], 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["head"]["bias"], by_hand(params["head"]["bias"], 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["posemb"]["table"], by_hand(params["posemb"]["table"], 0), rtol=1e-5, atol=1e-6)


def test_sgd_momentum_two_steps_by_hand(params):
    got = run(params, name="sgd", momentum=0.7, weight_decay=0.2)
    p, m = np.asarray(params["head"]["kernel"], np.float64), 0.0
    for t in (0, 1):
        m = 0.7 * m + np.cos((3.0 + t) * p)
        p = p - 0.1 * (m + 0.2 * p)
    np.testing.assert_allclose(got["head"]["kernel"], p, rtol=1e-5, atol=1e-6)


def test_clip_norm_bounds_the_update(params):
    moved = jax.tree.map(lambda new, old: new - old, run(params, 1, name="sgd", clip_norm=0.5, momentum=None), params)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.1 * 0.5, rtol=1e-5)


def test_numbers_may_be_traced_and_vmapped(params):
    section = {"name": "adamw", "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "clip_norm": 1.0}

    def member(p, learning_rate, weight_decay, clip_norm):
        numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay, "clip_norm": clip_norm}
        return run(p, 3, **section | numbers)

    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    rates, decays, clips = jnp.array([0.1, 0.2]), jnp.array([0.3, 0.0]), jnp.array([0.5, 1.0])
    together = jax.jit(jax.vmap(member))(stack, rates, decays, clips)
    for i in range(2):
        alone = run(
            jax.tree.map(lambda x, i=i: x[i], stack),
            3,
            **section
            | {"learning_rate": float(rates[i]), "weight_decay": float(decays[i]), "clip_norm": float(clips[i])},
        )
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=1e-6), together, alone)
