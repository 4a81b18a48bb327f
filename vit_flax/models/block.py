"""One block of the encoder, and its two halves.

Block        x + attention(norm(x)), then x + mlp(norm(x))
Attention    projections of queries, keys, values and output; the mathematics is the free function `attend`
Mlp, SwiGlu  the two feed-forward layers
"""

from collections.abc import Callable

from flax import linen as nn

from vit_flax.models.attend import attend, attend_with_weights
from vit_flax.models.layers import drop_path, saved
from vit_flax.models.posemb import Rotation, rotate
from vit_flax.typing import Array, Float


class Block(nn.Module):
    """Pre-norm encoder block: `x + attention(norm(x))`, then `x + mlp(norm(x))`; equations (2) and (3)."""

    norm: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    dropout: Callable[..., nn.Module]
    layer_scale: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop_rate: Float[Array, ""] | None,
        rotation: Rotation | None,
        reads: int | None,
    ) -> tuple[Float[Array, "b r d"], dict[str, Array]]:
        """Returns the tokens, the first `reads` of them or all, and what the two branches added to them."""
        out: dict[str, Array] = {}
        # The input too: JAX would keep it as it comes, which for bfloat16 on CPUs is not the form of `keep`.
        x = saved(x)
        y = self.norm(name="norm1")(x)
        context = None if reads is None else y
        y, weights = self.attention(name="attention")(y[:, :reads], context, rotation=rotation)
        x = x[:, :reads]
        out["attention"] = self._branch(y, drop_rate, "layer_scale1")
        x = x + out["attention"]
        y = self.mlp(name="mlp")(self.norm(name="norm2")(x))
        out["mlp"] = self._branch(y, drop_rate, "layer_scale2")
        x = out["residual"] = x + out["mlp"]
        if weights is not None:
            out["attention_weights"] = weights
        return x, out

    def _branch(self, y: Array, drop_rate: Array | None, name: str) -> Array:
        y = self.dropout()(y)
        if self.layer_scale is not None:
            y = self.layer_scale(name=name)(y)
        if drop_rate is not None:
            y = drop_path(y, drop_rate, self.make_rng("dropout"))
        return y


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to `context` (Vaswani et al. 2017, arXiv:1706.03762).

    Where `length` is a number, tokens behind it are padding; `return_weights` and dropout know no padding.
    """

    num_heads: int
    head_dim: int
    linear: Callable[..., nn.Module]
    bias: str
    qk_norm: Callable[..., nn.Module] | None
    rope: str | None
    dropout: Callable[..., nn.Module]
    impl: str
    return_weights: bool
    length: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b s d"] | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b k q s"] | None]:
        """Returns the attended tokens, and the attention weights where they were asked for.

        Args:
          x: the queries' tokens.
          context: what they attend to, if not themselves; then they have no position, as class tokens and probes.
          rotation: of keys and queries with a position.
        """
        has_position = context is None
        context = x if context is None else context
        heads_shape = (self.num_heads, self.head_dim)
        q = self.linear(heads_shape, use_bias="q" in self.bias, name="query")(x)
        k = self.linear(heads_shape, use_bias="k" in self.bias, name="key")(context)
        v = self.linear(heads_shape, use_bias="v" in self.bias, name="value")(context)
        if self.qk_norm is not None:
            q, k = self.qk_norm(name="query_norm")(q), self.qk_norm(name="key_norm")(k)
        if self.rope and rotation is not None:
            q = rotate(q, rotation, self.rope) if has_position else q
            k = rotate(k, rotation, self.rope)
        drop = self.dropout()
        weights = None
        if self.return_weights or (drop.rate > 0 and not drop.deterministic):  # type: ignore[attr-defined]
            y, weights = attend_with_weights(q, k, v, dropout=drop)
        else:
            y = attend(q, k, v, impl=self.impl, length=self.length)
        y = self.linear(x.shape[-1], in_axes=2, name="out")(y)
        return y, weights if self.return_weights else None


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    hidden: int
    activation: Callable[[Array], Array]
    linear: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] | None
    dropout: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Maps every token by itself."""
        y = self.activation(self.linear(self.hidden, bias_init=nn.initializers.normal(1e-6), name="fc1")(x))
        y = y if self.norm is None else self.norm(name="norm")(y)
        y = self.dropout()(y)
        return self.linear(x.shape[-1], bias_init=nn.initializers.normal(1e-6), name="fc2")(y)


class SwiGlu(nn.Module):
    """Gated feed-forward layer `fc2(activation(gate(x)) * fc1(x))` (Shazeer 2020, arXiv:2002.05202)."""

    hidden: int
    activation: Callable[[Array], Array]
    linear: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] | None
    dropout: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Maps every token by itself."""
        y = self.activation(self.linear(self.hidden, name="gate")(x)) * self.linear(self.hidden, name="fc1")(x)
        y = y if self.norm is None else self.norm(name="norm")(y)
        y = self.dropout()(y)
        return self.linear(x.shape[-1], name="fc2")(y)


MLPS: dict[str, type[nn.Module]] = {"mlp": Mlp, "swiglu": SwiGlu}
