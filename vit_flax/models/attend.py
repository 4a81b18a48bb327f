"""Attention as pure functions, and the choice between its implementations."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_flax.typing import Array, Float


def attend(
    q: Float[Array, "b q k e"], k: Float[Array, "b s k e"], v: Float[Array, "b s k e"], *, impl: str = "auto"
) -> Float[Array, "b q k e"]:
    """Softmax attention, `softmax(q k^T / sqrt(e)) v`, with the softmax in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      impl: "xla"; "cudnn", the fused kernel of NVIDIA's library; or "auto": "cudnn" where it runs, "xla" elsewhere.

    Raises: ValueError: "cudnn" was asked for by name where it cannot run; the message says why.
    Source: Vaswani et al. 2017, eq. (1) (arXiv:1706.03762); `jax.nn.dot_product_attention`.
    """
    return IMPLEMENTATIONS[impl](q, k, v)


def _xla(q: Array, k: Array, v: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # it asks for the common type of bfloat16 and float32
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    if reason := why_not_cudnn(q):
        raise ValueError(f"attention_impl='cudnn' cannot run here: {reason}. Use 'auto' or 'xla'.")
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _auto(q: Array, k: Array, v: Array) -> Array:
    return _xla(q, k, v) if why_not_cudnn(q) else _cudnn(q, k, v)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {"auto": _auto, "xla": _xla, "cudnn": _cudnn}


def why_not_cudnn(q: Array) -> str | None:
    """The reason why cuDNN's fused attention cannot take these queries, or None if it can.

    Source: the checks of `jax._src.cudnn.fused_attention_stablehlo` (jax 0.10).
    """
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {jax.default_backend()!r}"
    capability = str(jax.local_devices()[0].compute_capability)  # "8.0"; another form on AMD's
    if not re.fullmatch(r"\d+\.\d+", capability) or int(capability.split(".")[0]) < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later and this one has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16 and the compute dtype is {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dimension must be a multiple of 8 up to 128 and is {q.shape[-1]}"
    return None


def attend_with_weights(
    q: Float[Array, "b q k e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    *,
    dropout: Callable[[Array], Array],
) -> tuple[Float[Array, "b q k e"], Float[Array, "b k q s"]]:
    """As `attend`, with the attention weights in the open: to look at them, or to drop some in training.

    Args:
      q: queries.
      k: keys.
      v: values.
      dropout: applied to the weights.

    Returns: the attended values and the weights (before dropout, float32).
    """
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqke,bske->bkqs", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits)
    return jnp.einsum("bkqs,bske->bqke", dropout(weights).astype(v.dtype), v), weights
