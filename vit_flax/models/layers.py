"""What every part of the model is made of but the linear layer: norms, scales, drop-path, activations; what is kept."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from vit_flax.typing import Array, Float


def keep(x: Array) -> Array:
    """What a backward pass should save of an array; `kept` gives it back.

    Under a scan, saved arrays are stacked. XLA's CPU backend cannot slice bfloat16 and widens the whole stack to
    float32 first: there the bits are stacked.

    Raises: NotImplementedError: second derivatives of a bfloat16 model on CPUs: bits have none.
    """
    return _bits(x) if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else x


@jax.custom_jvp
def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


@_bits.defjvp
def _bits_have_no_derivative(*_: Any) -> Any:
    raise NotImplementedError("No second derivatives in bfloat16 on CPUs: make the model with dtype='float32'.")


def kept(x: Array) -> Array:
    """The array that `keep` was given."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
    """A cheap function whose backward pass saves nothing but its arguments and computes the rest again."""

    @jax.custom_vjp
    def f(*args: Array) -> Array:
        return function(*args)

    def forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
        return function(*args), tuple(keep(x) for x in args)

    def backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
        return jax.vjp(function, *(kept(x) for x in saved))[1](gradient)

    f.defvjp(forward, backward)
    return f


def in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of each element, computed in float32 and rounded once.

    Left to itself, bfloat16 rounds after every operation (in software on CPUs), and a backward pass keeps half a dozen
    intermediates of the widest layer of the model.
    """
    return recomputed(lambda x: function(x.astype(jnp.float32)).astype(x.dtype))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Each number times the normal distribution's probability of less (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    By `erf`, as PyTorch does. `jax.nn.gelu` takes `erfc`, which is more exact for large negative numbers, where the
    result is nothing beside a rounding of 1, and costs CPUs 2.4 times as much: it has three branches.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": in_float32(gelu),
    "gelu_tanh": in_float32(partial(nn.gelu, approximate=True)),
    "quick_gelu": in_float32(lambda x: x * nn.sigmoid(1.702 * x)),
    "silu": in_float32(nn.silu),
}


SAVED = "saved"  # the name that rules of rematerialisation have for what `saved` and `mark` were given


def mark(x: Array) -> Array:
    """`saved` for the forward half of a custom derivative, whose operations JAX does not differentiate."""
    return kept(checkpoint_name(keep(x), SAVED))


@jax.custom_jvp
def saved(x: Array) -> Array:
    """The array itself; rules of rematerialisation may have it kept for the backward pass, in the form of `keep`.

    On CPUs that form may be whole numbers, which have no derivative: hence a rule of our own.
    """
    return mark(x)


saved.defjvp(lambda primals, tangents: (mark(*primals), *tangents))


class LayerNorm(nn.Module):
    """Normalisation over the last axis, a factor and an offset per channel, all in float32 (arXiv:1607.06450).

    Flax's own does the same, but not under JAX's strict rules of dtype promotion.
    """

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises every vector by itself."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype).astype(jnp.float32)
        scale, bias = (jnp.expand_dims(p, range(x.ndim - 1)) for p in (scale, bias))

        def normalise(x: Array, scale: Array, bias: Array) -> Array:
            y = x.astype(jnp.float32)
            y -= jnp.mean(y, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
            return (y * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(self.dtype)

        return recomputed(normalise)(x, scale, bias)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021b, eq. (9), arXiv:2103.17239)."""

    initial: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Scales each channel."""
        scale = self.param("scale", nn.initializers.constant(self.initial), (x.shape[-1],), self.param_dtype)
        return x * scale.astype(x.dtype)[None, None, :]


def drop_path(x: Float[Array, "b n d"], rate: Float[Array, ""], key: Array) -> Float[Array, "b n d"]:
    """Zeroes a residual branch for a random part of the examples and scales up the others (arXiv:1603.09382).

    Args:
      x: the branch.
      rate: probability of dropping, in [0, 1]; a traced value, because blocks under a scan differ in it.
      key: random key.
    """
    keep = 1.0 - rate
    kept = jax.random.bernoulli(key, keep, (x.shape[0], 1, 1))
    scale = jnp.where(keep > 0, keep, 1.0).astype(x.dtype)  # else a branch never kept has the gradient 0 / 0
    return jnp.where(kept, x / scale, jnp.zeros_like(x))
