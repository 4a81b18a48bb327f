"""The layers against NumPy in float64: values, and the gradients that we wrote by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_flax.models.layers import (
    ACTIVATIONS,
    SAVED,
    LayerNorm,
    LayerScale,
    drop_path,
    keep,
    kept,
    recomputed,
    saved,
)

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
ERF = np.vectorize(math.erf)
FORMULAS = {
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def numbers(*shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def residuals(function, *args):
    """What the backward pass of a function keeps."""
    return [x for x in jax.tree.leaves(jax.vjp(function, *args)[1]) if hasattr(x, "dtype")]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes(name):
    x = np.linspace(-9, 9, 361)
    got, slope = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))(jnp.asarray(x, F32))
    np.testing.assert_allclose(got, FORMULAS[name](x), atol=2e-6)
    # tanh is a step early at its 1 in one of XLA's two ways to compute it: x * 1e-6 of the slope.
    np.testing.assert_allclose(slope, (FORMULAS[name](x + 1e-5) - FORMULAS[name](x - 1e-5)) / 2e-5, atol=1e-5)
    far = ACTIVATIONS[name](jnp.asarray([-1e4, 1e4], F32))
    np.testing.assert_allclose(far, [0, 1e4], atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bfloat16_round_once_and_keep_only_their_input(name):
    x = numbers(64, dtype=BF16)
    expected = jnp.asarray(FORMULAS[name](np.asarray(x, np.float64)), F32).astype(BF16)
    difference = np.abs(np.asarray(ACTIVATIONS[name](x), F32) - np.asarray(expected, F32))
    assert (difference <= np.abs(np.asarray(expected, F32)) * 2**-8).all()  # half a unit in the last place, or one more
    assert [r.shape for r in residuals(ACTIVATIONS[name], x)] == [(64,)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_kept_comes_back_bit_for_bit(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, jnp.inf, -jnp.inf, jnp.nan, 1e-40], dtype)
    assert keep(x).dtype == (jnp.uint16 if dtype == BF16 else dtype)
    assert kept(keep(x)).tobytes() == x.tobytes()


def test_bits_refuse_to_lose_a_second_derivative():
    with pytest.raises(NotImplementedError, match="dtype='float32'"):
        jax.grad(lambda x: jnp.sum(kept(keep(x)).astype(F32)))(numbers(6, dtype=BF16))


def test_recomputed_saves_its_arguments_only():
    plain = lambda x, y: jnp.sum(jnp.exp(jnp.sin(x)) * jnp.cos(y))  # noqa: E731
    x, y = numbers(6), numbers(6, seed=1)
    np.testing.assert_array_equal(recomputed(plain)(x, y), plain(x, y))
    for got, want in zip(jax.grad(recomputed(plain), (0, 1))(x, y), jax.grad(plain, (0, 1))(x, y)):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert sorted(r.tobytes() for r in residuals(recomputed(plain), x, y)) == sorted([x.tobytes(), y.tobytes()])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_saved_lets_the_gradient_through(dtype):
    """The bits of a bfloat16 array are whole numbers, through which no gradient flows by itself."""

    def loss(x):
        return jnp.sum(jnp.sin(saved(jnp.sin(x)).astype(F32)))

    x = numbers(6, dtype=dtype)
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    expected = np.cos(np.sin(np.asarray(x, np.float64))) * np.cos(np.asarray(x, np.float64))
    for function in (loss, jax.checkpoint(loss, policy=policy)):
        gradient = jax.jit(jax.grad(function))(x)
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, atol=1e-6 if dtype == F32 else 2e-2)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_layer_norm(offset):
    x, scale, bias = numbers(3, 5, 16) + offset, 1 + numbers(16, seed=1), numbers(16, seed=2)
    layer = LayerNorm(1e-6, F32, F32)

    def by_the_equation(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias

    got = layer.apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(got, by_the_equation(*(np.asarray(a, np.float64) for a in (x, scale, bias))), atol=3e-4)

    def loss(params, x):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    reference = nn.LayerNorm(1e-6)
    want = jax.grad(lambda p, x: jnp.sum(jnp.sin(reference.apply({"params": p}, x))), (0, 1))
    params = {"scale": scale, "bias": bias}
    if offset == 0.0:
        for a, b in zip(jax.tree.leaves(jax.grad(loss, (0, 1))(params, x)), jax.tree.leaves(want(params, x))):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_layer_norm_of_bfloat16_keeps_statistics_in_float32():
    x = jnp.asarray([[1000.0, 1008.0] * 8], BF16)
    y = LayerNorm(1e-6, BF16, F32).init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_array_equal(np.asarray(y, F32), [[-1.0, 1.0] * 8])


def test_layer_scale_starts_at_its_initial_value_and_keeps_the_dtype():
    x = numbers(2, 3, 4, dtype=BF16)
    y, variables = LayerScale(0.5, F32).init_with_output(jax.random.key(0), x)
    assert y.dtype == BF16
    np.testing.assert_array_equal(y, x * 0.5)
    assert variables["params"]["scale"].dtype == F32


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_drop_path_drops_whole_examples_and_scales_up_the_others(dtype):
    x = jnp.ones((4000, 2, 3), dtype)
    y = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)), F32)
    assert (y == y[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=4e-3)
    assert abs((y[:, 0, 0] == 0).mean() - 0.25) < 0.03


def test_a_branch_that_is_never_kept_has_no_gradient():
    grad = jax.grad(lambda x: drop_path(x, jnp.float32(1.0), jax.random.key(0)).sum())(jnp.ones((4, 2, 3)))
    np.testing.assert_array_equal(grad, 0.0)
