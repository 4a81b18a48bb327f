import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.schedules import SHAPES, make_schedule

TOTAL = 100


def rates(steps, **section) -> list[float]:
    rate = jax.jit(make_schedule(**{"lr": 2.0, "total_steps": TOTAL} | section))
    return [float(rate(step)) for step in steps]


@pytest.mark.parametrize(
    ("section", "want"),
    [
        ({"schedule": "constant"}, {0: 2.0, 50: 2.0, 99: 2.0}),
        ({"schedule": "linear"}, {0: 2.0, 25: 1.5, 99: 0.02, 100: 0.0, 150: 0.0}),
        ({"schedule": "cosine"}, {0: 2.0, 50: 1.0, 99: 1 + math.cos(math.pi * 0.99), 100: 0.0}),
        ({"schedule": "cosine", "warmup_steps": 20}, {0: 0.0, 5: 0.5, 20: 2.0, 60: 1.0, 100: 0.0}),
        ({"schedule": "cosine", "warmup_steps": 20, "warmup_lr": 1.0}, {0: 1.0, 10: 1.5, 20: 2.0}),
        ({"schedule": "cosine", "end_lr": 0.4}, {0: 2.0, 50: 1.2, 100: 0.4}),
        ({"schedule": "cosine", "end_lr": 0.4, "end_steps": 20}, {0: 2.0, 40: 1.2, 80: 0.4, 99: 0.4}),
        ({"schedule": "rsqrt", "timescale_steps": 10}, {0: 2.0, 10: 2 / 2**0.5, 90: 2 / 10**0.5}),
        ({"schedule": "rsqrt"}, {0: 2.0, 99: 2 / 1.0099**0.5}),
        ({"schedule": "rsqrt", "timescale_steps": 10, "warmup_steps": 20}, {10: 1.0, 20: 2.0, 30: 2 / 2**0.5}),
        ({"schedule": "rsqrt", "timescale_steps": 10, "cooldown_steps": 20}, {80: 2 / 3, 90: 1 / 10**0.5, 100: 0.0}),
        ({"schedule": "rsqrt", "timescale_steps": 10, "end_steps": 20}, {70: 2 / 8**0.5, 80: 0.0, 99: 0.0}),
        ({"schedule": "wsd", "warmup_steps": 10, "cooldown_steps": 20}, {5: 1.0, 10: 2.0, 80: 2.0, 90: 1.0, 100: 0.0}),
        ({"schedule": "wsd", "cooldown_steps": 20, "end_lr": 1.0}, {80: 2.0, 90: 1.5, 100: 1.0}),
        ({"schedule": "wsd", "cooldown_steps": 20, "end_steps": 10}, {70: 2.0, 80: 1.0, 90: 0.0, 99: 0.0}),
        ({"schedule": "wsd", "cooldown_steps": 16, "cooldown_shape": "sqrt"}, {84: 2.0, 88: 1.0, 100: 0.0}),
    ],
    ids=str,
)
def test_values(section, want):
    np.testing.assert_allclose(rates(want, **section), list(want.values()), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SHAPES)
def test_traced_numbers_give_the_same_rates_and_vmap(schedule):
    numbers = {"lr": 0.3, "warmup_steps": 7, "cooldown_steps": 13, "end_steps": 5, "end_lr": 0.01}

    def rate(step, numbers):
        return make_schedule(schedule=schedule, total_steps=TOTAL, **numbers)(step)

    steps = jnp.arange(TOTAL + 1)
    traced = jax.jit(jax.vmap(rate, in_axes=(0, None)))(steps, jax.tree.map(jnp.asarray, numbers))
    fixed = jax.jit(jax.vmap(lambda step: rate(step, numbers)))(steps)
    np.testing.assert_allclose(traced, fixed, rtol=1e-6, atol=1e-8)
    assert traced.dtype == jnp.float32
    assert np.argmax(traced) == 7


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"schedule": "cosin"}, "Unknown schedule='cosin'; expected one of cosine, linear"),
        ({"schedule": "wsd", "cooldown_steps": 5, "cooldown_shape": "exp"}, "cooldown_shape='exp'.*linear, sqrt"),
        ({"warmup_steps": 60, "cooldown_steps": 50}, r"found \[60, 0, 50\].*total_steps=100"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"schedule": "wsd"}, "cooldown_steps > 0"),
        ({"schedule": "constant", "end_lr": 0.1}, "never reaches end_lr"),
        ({"warmup_lr": 0.5}, "warmup_lr is where the warm-up starts, and there is none; give warmup_steps > 0"),
        ({"cooldown_shape": "sqrt"}, "cooldown_shape='sqrt' without a cool-down; give cooldown_steps > 0"),
        ({"schedule": "cosine", "timescale_steps": 10}, "timescale_steps belongs to schedule='rsqrt'"),
    ],
    ids=str,
)
def test_mistakes_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        rates([0], **section)
