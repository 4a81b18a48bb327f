"""The linear layer against NumPy in float64: values, and the gradients that we wrote by hand, in both of its forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.models.linear import Linear, affine, product

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def numbers(*shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "in_axes", "equation"),
    [
        ((2, 5, 3), (3, 7), 1, "bni,io->bno"),  # to more numbers,
        ((2, 5, 7), (7, 3), 1, "bni,io->bno"),  # to fewer,
        ((2, 5, 6), (6, 2, 4), 1, "bni,ike->bnke"),  # to heads,
        ((2, 5, 2, 4), (2, 4, 3), 2, "bnke,keo->bno"),  # from heads
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_affine_and_its_gradients(x_shape, kernel_shape, in_axes, equation, dtype, backend, bias, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel = numbers(*x_shape, dtype=dtype), numbers(*kernel_shape, seed=1)
    b = numbers(*kernel_shape[in_axes:], seed=3) if bias else None
    y, vjp = jax.vjp(lambda x, kernel, b: affine(x, kernel, b, in_axes), x, kernel, b)
    dy = numbers(*y.shape, seed=2, dtype=dtype)
    dx, dkernel, db = vjp(dy)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype, dtype, F32)
    rounded = [np.asarray(a.astype(dtype), np.float64) for a in (x, kernel, dy)]
    operands, result = equation.split("->")
    first, second = operands.split(",")
    expected = np.einsum(equation, *rounded[:2])
    rounding = 1e-6 if dtype == F32 else 2**-8
    # Where the bias is added to a rounded product, as an accelerator may, that is rounded by itself.
    slack = 1e-5 if dtype == F32 or not bias else 2**-8 * np.abs(expected).max()
    if b is not None:
        expected = expected + np.asarray(b, np.float64)
        assert db.dtype == F32
        np.testing.assert_allclose(db, rounded[2].sum(tuple(range(rounded[2].ndim - b.ndim))), atol=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=slack, rtol=rounding)
    np.testing.assert_allclose(dkernel, np.einsum(f"{first},{result}->{second}", rounded[0], rounded[2]), atol=1e-5)
    expected = np.einsum(f"{result},{second}->{first}", rounded[2], rounded[1])
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, atol=1e-5, rtol=rounding)


def test_the_form_of_gpus_is_that_of_their_library(monkeypatch):
    """A plain product of two matrices with a bias of its dtype, whatever the axes; not merged with others of its x."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, kernel, bias = (jax.ShapeDtypeStruct(shape, BF16) for shape in ((2, 5, 6), (6, 2, 4), (2, 4)))
    text = jax.jit(lambda *a: affine(*a, 1)).trace(x, kernel, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert "(tensor<10x6xbf16>, tensor<6x8xbf16>) -> tensor<10x8xbf16>" in text
    assert "stablehlo.optimization_barrier" in text
    assert "f32" not in text


def test_products_of_bfloat16_are_summed_in_float32():
    x = jnp.ones((1, 4097), BF16)
    assert product(x, jnp.ones((4097, 1)), 1).item() == 4097  # which bfloat16 does not have


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_gradients_of_a_bias_are_summed_in_float32(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel, bias = jnp.ones((4097, 1), BF16), jnp.ones((1, 1)), jnp.zeros(1)
    _, vjp = jax.vjp(lambda bias: affine(x, kernel, bias, 1), bias)
    assert vjp(jnp.ones((4097, 1), BF16))[0].item() == 4097


@pytest.mark.parametrize(("features", "in_axes", "fans"), [(6, 1, (8, 6)), ((3, 2), 1, (8, 6)), (6, 2, (32, 6))])
def test_initialisers_see_the_flattened_kernel(features, in_axes, fans):
    seen = []

    def init(key, shape, dtype):
        seen.append(shape)
        return jnp.arange(math.prod(shape), dtype=dtype).reshape(shape)

    layer = Linear(features, F32, F32, in_axes=in_axes, kernel_init=init)
    params = layer.init(jax.random.key(0), jnp.zeros((2, 4, 8)))["params"]
    assert seen[0] == fans
    np.testing.assert_array_equal(params["kernel"].ravel(), np.arange(math.prod(fans)))
    assert params["bias"].shape == ((features,) if isinstance(features, int) else features)


def test_linear_adds_its_bias_before_rounding():
    layer = Linear(1, BF16, F32)
    params = {"kernel": jnp.ones((2, 1)), "bias": jnp.asarray([-256.0])}
    x = jnp.asarray([[256.0, 1.0]], BF16)  # 257 is not in bfloat16
    assert layer.apply({"params": params}, x).item() == 1.0
    without = Linear(1, BF16, F32, use_bias=False)
    assert list(without.init(jax.random.key(0), x)["params"]) == ["kernel"]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_affine_of_members_and_its_second_derivative(backend, monkeypatch):
    """As a vmapped sweep and a gradient penalty take them."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel, bias = numbers(3, 9, 4), numbers(3, 4, 5, seed=1), numbers(3, 5, seed=2)

    def penalty(function):
        loss = lambda x, kernel, bias: jnp.sum(jnp.sin(function(x, kernel, bias)))  # noqa: E731
        return jax.vmap(jax.grad(lambda *a: jnp.sum(jnp.square(jax.grad(loss)(*a))), (0, 1, 2)))

    got = penalty(lambda *a: affine(*a, 1))(x, kernel, bias)
    want = penalty(lambda x, kernel, bias: x @ kernel + bias[None])(x, kernel, bias)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-4)
