"""The linear layer, and its matrix products in the forms that each backend runs at its full rate."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_flax.models.layers import keep, kept, saved
from vit_flax.typing import Array, Float


class Linear(nn.Module):
    """`x @ kernel + bias` over the last `in_axes` axes of the input, to one or several output axes; see `affine`."""

    features: int | Sequence[int]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    in_axes: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *in]` to `[..., *features]`; the kernel is `[*in, *features]`."""
        fan_in = x.shape[-self.in_axes :]
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)

        def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            flat = (math.prod(fan_in), math.prod(features))  # the fans that an initialiser has to see
            return self.kernel_init(key, flat, dtype).reshape(shape)

        kernel = self.param("kernel", init, (*fan_in, *features), self.param_dtype)
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        return saved(affine(x.astype(self.dtype), kernel, bias, self.in_axes))


def affine(
    x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Float[Array, "..."] | None, in_axes: int
) -> Float[Array, "..."]:
    """Sums over the last `in_axes` axes of `x` and the first of the kernel, plus a bias, in the dtype of `x`.

    Whatever that dtype is, products are accumulated in float32 and the bias is added in float32; on GPUs the bias is
    first rounded to the dtype of `x`, as their library takes it, and where XLA does not hand it to the library, it is
    added to the rounded product. Gradients of parameters keep float32.
    """
    if jax.default_backend() == "gpu":
        return _affine_of_rows(x, kernel, bias, in_axes)
    y: Array = product(x, kernel, in_axes)  # pyright: ignore[reportAssignmentType]
    if bias is not None:
        bias = bias.astype(jnp.float32)
        y = y.astype(jnp.float32) + jnp.expand_dims(bias, range(y.ndim - bias.ndim))
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "..."], kernel: Float[Array, "..."], in_axes: int) -> Float[Array, "..."]:
    """Sums over the last `in_axes` axes of `x` and the first of the kernel, in the dtype of `x`, with float32 sums.

    The result is float32 on CPUs, which take twice as long to write bfloat16; elsewhere it has the dtype of `x`, as
    the libraries of accelerators round it while they write, and others then read half as much. The products of the
    backward pass take their operands in the dtype of `x` too (JAX's own derivative of a product with a float32 result
    runs in float32), and are written in the forms that XLA's CPU backend runs at its full rate. The kernel's gradient
    keeps float32. No forward mode.
    """
    return _dot(x, kernel.astype(x.dtype), (range(x.ndim - in_axes, x.ndim), range(in_axes)), _result(x))


def _result(x: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else x.dtype


def _save_operands(x: Array, kernel: Array, in_axes: int) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, in_axes), (keep(x), kernel)


def _backward_products(in_axes: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept(saved[0]), saved[1]
    gradient = gradient.astype(x.dtype)
    leading = x.ndim - in_axes
    outputs = range(leading, gradient.ndim), range(in_axes, kernel.ndim)
    dx = _dot(gradient, kernel.astype(x.dtype), outputs, _result(x))
    # Turning a sum over few vectors gains nothing, and under vmap it makes XLA's CPU backend abort (jaxlib 0.10.2).
    few = math.prod(x.shape[:leading]) < 8
    if few or math.prod(x.shape[leading:]) <= math.prod(kernel.shape[in_axes:]):
        dkernel = _dot(x, gradient, (range(leading), range(leading)))
    else:
        # XLA copies the left operand, turned: let it be the smaller one. The barrier keeps it from turning it back.
        turned = jax.lax.optimization_barrier(_dot(gradient, x, (range(leading), range(leading))))
        n = turned.ndim - in_axes
        dkernel = turned.transpose(*range(n, turned.ndim), *range(n))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _dot(a: Array, b: Array, contracted: tuple[Sequence[int], Sequence[int]], result: Any = jnp.float32) -> Array:
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=result)


product.defvjp(_save_operands, _backward_products)


def _affine_of_rows(x: Array, kernel: Array, bias: Array | None, in_axes: int) -> Array:
    """`affine` of plain matrices: XLA lays out the axes of larger products as it likes, and transposes them back."""
    leading, outputs = x.shape[: x.ndim - in_axes], kernel.shape[in_axes:]
    rows = x.reshape(math.prod(leading), math.prod(x.shape[x.ndim - in_axes :]))
    kernel = kernel.reshape(rows.shape[1], math.prod(outputs))
    y: Array = _of_rows(rows, kernel, None if bias is None else bias.reshape(-1))  # pyright: ignore
    return y.reshape(*leading, *outputs)


@jax.custom_vjp
def _of_rows(x: Float[Array, "n i"], kernel: Float[Array, "i o"], bias: Float[Array, "o"] | None) -> Array:
    """`x @ kernel + bias` in the form in which cuBLAS adds the bias while it writes the product.

    That is: a bias of the dtype of the product. XLA would also merge products that share an operand, here those of
    queries, keys and values, only to cut the result apart again: behind a barrier with different kernels it does not.
    """
    x, kernel = jax.lax.optimization_barrier((x, kernel.astype(x.dtype)))
    y = _dot(x, kernel, ((1,), (0,)), x.dtype)
    return y if bias is None else y + bias.astype(y.dtype)[None]


def _save_rows(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _of_rows(x, kernel, bias), (x, kernel, bias)


def _gradients_of_rows(
    operands: tuple[Array, Array, Array | None], gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = operands
    dbias = None if bias is None else jnp.sum(gradient.astype(jnp.float32), axis=0).astype(bias.dtype)
    x, rounded = jax.lax.optimization_barrier((x, kernel.astype(x.dtype)))
    dx = _dot(gradient, rounded, ((1,), (1,)), x.dtype)
    return dx, _dot(x, gradient, ((0,), (0,))).astype(kernel.dtype), dbias


_of_rows.defvjp(_save_rows, _gradients_of_rows)
