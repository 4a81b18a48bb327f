"""From tokens to one vector per image, and from there to logits."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from vit_flax.typing import Array, Float

PoolFn = Callable[[Float[Array, "b n d"]], Float[Array, "b *m"]]


@dataclass(frozen=True)
class Pool:
    """How tokens become features.

    Attributes:
      make: `make(prefix, attention, mlp, norm)` gives a function of the tokens.
      reads: how many tokens that function reads, from the first on; None for all.
      needs_class_token: whether the first token must be the class token.
      needs_dist_token: whether the second must be the distillation token.
    """

    make: Callable[..., PoolFn]
    reads: int | None = None
    needs_class_token: bool = False
    needs_dist_token: bool = False


class MapPool(nn.Module):
    """Multi-head attention pooling: one learned query attends to all patches, then an MLP with a skip connection.

    Source: Lee et al. 2019 (arXiv:1810.00825) as in Zhai et al. 2022 (arXiv:2106.04560).
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pools the tokens."""
        b, _, d = x.shape
        # The probe's dtype follows the tokens; its own is that of the other parameters.
        probe_dtype = self.norm.keywords["param_dtype"]  # type: ignore[attr-defined]
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d), probe_dtype)
        probe = jnp.broadcast_to(probe.astype(x.dtype), (b, 1, d))
        x, _ = self.attention(name="attention")(probe, context=x)
        return (x + self.mlp(name="mlp")(self.norm(name="norm")(x)))[:, 0]


def _tokens(number: int) -> Callable[..., PoolFn]:
    """The first `number` tokens, `[b, d]` for one."""
    return lambda **_: lambda x: x[:, 0] if number == 1 else x[:, :number]


def _gap(prefix: int, **_: object) -> PoolFn:
    return lambda x: jnp.mean(x[:, prefix:], axis=1)


def _tok_gap(prefix: int, **_: object) -> PoolFn:
    return lambda x: jnp.concatenate([x[:, 0], jnp.mean(x[:, prefix:], axis=1)], axis=-1)


def _map(prefix: int, attention: Callable, mlp: Callable, norm: Callable) -> PoolFn:
    module = MapPool(attention, mlp, norm, name="pool")
    return lambda x: module(x[:, prefix:])


POOLS: dict[str, Pool] = {
    "tok": Pool(_tokens(1), reads=1, needs_class_token=True),  # the class token
    "gap": Pool(_gap),  # mean over the patches
    "map": Pool(_map),  # attention pooling over the patches
    "none": Pool(lambda **_: lambda x: x),  # every token by itself
    "tok_gap": Pool(_tok_gap, needs_class_token=True),  # class token and mean side by side (DINOv2's linear classifier)
    # Two tokens, two heads (DeiT).
    "tok_dist": Pool(_tokens(2), reads=2, needs_class_token=True, needs_dist_token=True),
}


def classify(x: Float[Array, "b *m"], head: Callable[..., nn.Module], *, pool: str) -> tuple[Array, dict[str, Array]]:
    """Logits, and those of each head where the pooling feeds two (their mean is the model's answer).

    Args:
      x: pooled features; `[b, 2, d]` for the pooling "tok_dist".
      head: constructor of the linear layer, whose result is float32.
      pool: the pooling that made `x`.
    """
    if pool != "tok_dist":
        return head(name="head")(x), {}
    token = head(name="head")(x[:, 0])
    dist = head(name="head_dist")(x[:, 1])
    return (token + dist) / 2, {"token": token, "dist": dist}
