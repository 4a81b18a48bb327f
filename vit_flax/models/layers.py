"""The layers that every part of the model is made of: `Linear`, `drop_path`, `LayerScale`, the activations."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_flax.typing import Array, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


class Linear(nn.Module):
    """`x @ kernel + bias` over the last `in_axes` axes of the input, to one or several output axes.

    Products are accumulated and the bias is added in float32, whatever `dtype` is; the result is cast once. XLA's CPU
    backend runs bfloat16 products with a float32 result at more than twice the rate of those with a bfloat16 result.
    """

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
        y = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            ((range(x.ndim - self.in_axes, x.ndim), range(self.in_axes)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, features, self.param_dtype)
            y += jnp.expand_dims(bias.astype(jnp.float32), range(y.ndim - len(features)))
        return y.astype(self.dtype)


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
      rate: probability of dropping, in [0, 1); a traced value, because blocks under a scan differ in it.
      key: random key.
    """
    keep = 1.0 - rate
    kept = jax.random.bernoulli(key, keep, (x.shape[0], 1, 1))
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros_like(x))
