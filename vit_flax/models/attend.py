"""Attention as pure functions, and the choice between its implementations."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vit_flax.models.layers import keep, kept, mark, saved
from vit_flax.typing import Array, Float


def attend(
    q: Float[Array, "b q k e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    *,
    impl: str = "auto",
    length: int | None = None,
) -> Float[Array, "b q k e"]:
    """Softmax attention, `softmax(q k^T / sqrt(e)) v`, with the softmax in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      impl: "xla", JAX's own; "cudnn", the fused kernel of NVIDIA's library; "cpu", see `_cpu`; or "auto": "cpu" on
        CPUs, "cudnn" where it runs, "xla" elsewhere.
      length: how many keys count, from the first on; None for all. The rest, and queries behind it, are padding (see
        `padding`): nothing attends to them. Their results mean nothing, but are finite; where these get no gradient,
        neither do they, since the layers in front sum gradients over all tokens.

    Raises: ValueError: "cudnn" was asked for by name where it cannot run; the message says why.
    Source: Vaswani et al. 2017, eq. (1) (arXiv:1706.03762); `jax.nn.dot_product_attention`.
    """
    return IMPLEMENTATIONS[impl](q, k, v, length)


def padding(q: Float[Array, "b n k e"] | jax.ShapeDtypeStruct, *, impl: str) -> int:
    """How many tokens a sequence that attends to itself should have more, so that `attend` need not add them.

    JAX refuses the backward pass of cuDNN's kernel for an odd number of tokens, as those with a class token are.
    """
    return q.shape[1] % 2 if impl in ("auto", "cudnn") and why_not_cudnn(q, q, q) is None else 0


def _xla(q: Array, k: Array, v: Array, length: int | None) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # it asks for the common type of bfloat16 and float32
        return saved(jax.nn.dot_product_attention(q, k[:, :length], v[:, :length], implementation="xla"))


def _cudnn(q: Array, k: Array, v: Array, length: int | None) -> Array:
    if reason := why_not_cudnn(q, k, v):
        raise ValueError(f"attention_impl='cudnn' cannot run here: {reason}. Use 'auto' or 'xla'.")
    return saved(_fused(q, k, v, length))


def _fused(q: Array, k: Array, v: Array, length: int | None = None) -> Array:
    """The kernel of cuDNN, with even numbers of queries and keys (see `padding`); a length masks the keys behind it.

    Queries that are padding attend like others: their results are finite, and what nobody reads has no gradient.
    """
    queries, keys, lengths = q.shape[1], length or k.shape[1], {}
    if length is not None:
        k, v = _without_gradient_behind(k, length), _without_gradient_behind(v, length)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) if x.shape[1] % 2 else x for x in (q, k, v))
    if keys < k.shape[1]:
        # The lengths depend on q, so that under vmap every member has its own: JAX's batching rule needs that.
        one = q[:, 0, 0, 0] == 0
        for name, number in (("query_seq_lengths", q.shape[1]), ("key_value_seq_lengths", keys)):
            lengths[name] = jnp.where(one, jnp.int32(number), jnp.int32(number))
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)[:, :queries]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _without_gradient_behind(x: Float[Array, "b n k e"], length: int) -> Float[Array, "b n k e"]:
    """The array itself. What cuDNN writes into the gradients of keys that it masks, its documentation does not say."""
    return x


def _zero_behind(length: int, _: None, gradient: Array) -> tuple[Array]:
    zeros = jnp.zeros_like(gradient[:, length:])
    return (jax.lax.dynamic_update_slice_in_dim(gradient, zeros, length, axis=1),)  # in place


_without_gradient_behind.defvjp(lambda x, length: (x, None), _zero_behind)


@jax.custom_vjp
def _cpu(q: Array, k: Array, v: Array) -> Array:
    """The products in the forms that XLA's CPU backend runs at its full rate; runs anywhere, without forward mode.

    That is: one batch axis, the left operand contracted over its last axis, a float32 result. Other forms run at half
    the rate in float32 and a quarter in bfloat16. The backward pass keeps no weights: it computes them again from the
    logarithm of their sum, and the row sums of `weights * d_weights` as those of `y * dy` (Dao et al. 2022,
    arXiv:2205.14135, appendix B.2).
    """
    return _cpu_forward(q, k, v)[0]


def _cpu_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    products = _batched_dot(_heads(q), _heads(k), 2)
    largest = jnp.max(products, axis=-1, keepdims=True)
    weights = jnp.exp((products - largest) * _scale(q))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = _batched_dot(weights.astype(v.dtype), _heads(v), 1) / total  # dividing here is n / e times cheaper
    y, log_total = mark(_tokens(y, q)), mark(largest * _scale(q) + jnp.log(total))
    return y, (*(keep(x) for x in (q, k, v, y)), log_total)


def _cpu_backward(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v, y, log_total = (kept(x) for x in residuals)
    qh, kh, dyh = _heads(q), _heads(k), _heads(dy)
    row_sums = _heads(jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True))
    # The n x n arrays are turned, [m, s, q]: two of the three products that read them want them so.
    log_total, row_sums = (x.reshape(x.shape[0], 1, x.shape[1]) for x in (log_total, row_sums))
    weights = jnp.exp(_batched_dot(kh, qh, 2) * _scale(q) - log_total)
    dweights = _batched_dot(_heads(v), dyh, 2)
    dlogits = (weights * (dweights - row_sums) * _scale(q)).astype(q.dtype)
    dk = _batched_dot(dlogits, qh, 1)
    dv = _batched_dot(weights.astype(q.dtype), dyh, 1)
    return _turned_product(dlogits, k), _tokens(dk, k), _tokens(dv, v)


_cpu.defvjp(_cpu_forward, _cpu_backward)


def _scale(q: Array) -> float:
    return q.shape[-1] ** -0.5


def _heads(x: Float[Array, "b n k e"]) -> Float[Array, "m n e"]:
    b, n, k, e = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * k, n, e)


def _tokens(x: Float[Array, "m n e"], like: Float[Array, "b s k e"]) -> Float[Array, "b n k e"]:
    b, _, k, e = like.shape
    return x.astype(like.dtype).reshape(b, k, x.shape[1], e).transpose(0, 2, 1, 3)


def _turned_product(turned: Float[Array, "m s q"], x: Float[Array, "b s k e"]) -> Float[Array, "b q k e"]:
    """Sums `turned` and `x` over s."""
    if x.dtype == jnp.float32:
        product = jax.lax.dot_general(turned, _heads(x), (((1,), (1,)), ((0,), (0,))))
        return _tokens(product, x)
    # A bfloat16 product over the first axes is widened to float32. The small operand is turned, not the n x n one; and
    # a transpose right behind a bfloat16 product is folded into it by XLA (jaxlib 0.10), to a form it then cannot run.
    b, _, k, e = x.shape
    product = _batched_dot(x.transpose(0, 2, 3, 1).reshape(b * k, e, x.shape[1]), turned, 1)
    return product.astype(x.dtype).reshape(b, k, e, turned.shape[2]).transpose(0, 3, 1, 2)


def _batched_dot(a: Array, b: Array, contracted: int) -> Array:
    axes = ((2,), (contracted,)), ((0,), (0,))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _auto(q: Array, k: Array, v: Array, length: int | None) -> Array:
    if jax.default_backend() == "cpu":
        return _of_cpu(q, k, v, length)
    return _xla(q, k, v, length) if why_not_cudnn(q, k, v) else _cudnn(q, k, v, length)


def _of_cpu(q: Array, k: Array, v: Array, length: int | None) -> Array:
    return _cpu(q, k[:, :length], v[:, :length])


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, int | None], Array]] = {
    "auto": _auto,
    "cpu": _of_cpu,
    "cudnn": _cudnn,
    "xla": _xla,
}


def why_not_cudnn(q: Any, k: Any, v: Any) -> str | None:
    """The reason why cuDNN's fused attention cannot take these arrays in both directions, or None if it can.

    What JAX itself checks, some of it by the versions of cuDNN and GPU, is found by tracing, not by a list of ours.
    """
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {jax.default_backend()!r}"
    capability = str(jax.local_devices()[0].compute_capability)  # "8.0"; another form on AMD's
    if not re.fullmatch(r"\d+\.\d+", capability) or int(capability.split(".")[0]) < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later and this one has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16 and the compute dtype is {q.dtype}"
    try:
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
        jax.eval_shape(lambda *x: jax.vjp(_fused, *x)[1](x[0]), *arrays)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).strip().rstrip(".")
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
    return saved(jnp.einsum("bkqs,bske->bqke", dropout(weights).astype(v.dtype), v)), weights
