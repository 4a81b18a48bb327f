"""The stack of blocks; the only place that knows about scan and rematerialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint

from vit_flax.models.layers import SAVED
from vit_flax.models.posemb import Rotation
from vit_flax.typing import Array, Float


def _all_but_lookups(primitive: Any, *_: Any, **__: Any) -> bool:
    """Everything but the parameters that a block of a loop looks up in the stacks, where they lie anyway."""
    return primitive.name not in ("dynamic_slice", "squeeze")


# What of a block is kept for the backward pass: all that it reads; only its input and the results of the linear layers
# and of the attention; those, in the memory of the host; or nothing but its input. The rest is computed again.
REMAT: dict[str, Callable[..., Any]] = {
    "none": _all_but_lookups,
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Encoder(nn.Module):
    """The stack of blocks, scanned or looped, with or without rematerialisation: same logits, gradients and `out`.

    `padding` tokens are behind the others while the blocks run, for the attention (see `attend.padding`).
    """

    block: Callable[..., nn.Module]
    depth: int
    scan: bool
    unroll: int | None
    remat: str
    padding: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop_rates: Float[Array, "l"] | None,
        rotation: Rotation | None,
        reads: int | None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b r d"], dict[str, Any]]:
        """Applies the blocks.

        Args:
          x: tokens.
          drop_rates: of every block's branches, or None.
          rotation: of queries and keys, or None.
          reads: how many tokens the pooling reads, from the first on; None for all.

        Returns: the tokens; those that the pooling reads; and every block's outputs, stacked on a leading axis [l]. For
          the tokens that the pooling does not read, the last block computes keys and values; the rest is computed
          apart, and only if somebody reads it (so that in training dropout and drop-path draw new numbers for it).
        """
        if not self.padding:
            return self._blocks(_batch_outermost(x), drop_rates, rotation, reads)
        length = x.shape[1]
        x = _batch_outermost(jnp.pad(x, ((0, 0), (0, self.padding), (0, 0))))
        rotation = jax.tree.map(lambda table: jnp.pad(table, ((0, self.padding), (0, 0))), rotation)
        x, read, out = self._blocks(x, drop_rates, rotation, reads)
        return x[:, :length], read[:, :length], jax.tree.map(lambda y: y[:, :, :length], out)

    def _blocks(
        self, x: Array, drop_rates: Array | None, rotation: Rotation | None, reads: int | None
    ) -> tuple[Array, Array, dict[str, Any]]:
        remat = self.remat
        if remat == "auto":
            # On CPUs the step waits for the memory that a scan stacks, more than for what is cheap to compute again.
            remat = "dots" if self.scan and jax.default_backend() == "cpu" else "none"
        # On an H200 a training step of B/16 spends a sixth of its time copying into and out of the stacks of a scan;
        # where all blocks are unrolled it does not. They take longer to compile.
        unroll = self.unroll or (self.depth if jax.default_backend() == "gpu" else 1)

        # Where not all tokens are read, the last block is applied by itself. The others then look up their parameters
        # by number: to scan over stacks without the last layer would copy nearly all parameters.
        first = self.depth if reads is None or self.is_initializing() else self.depth - 1
        by_number = self.scan and first < self.depth

        def apply(block: nn.Module, x: Array, i: Any, rate: Array | None, reads: int | None) -> tuple[Array, Any]:
            def one(block: nn.Module, x: Array) -> tuple[Array, Any]:
                return block(x, rate, rotation, reads)

            ith = nn.map_variables(one, "params", lambda stacks: jax.tree.map(lambda stack: stack[i], stacks))
            return (ith if by_number else one)(block, x)

        if remat != "none" or (by_number and unroll < first):
            prevent_cse = remat != "none" and (not self.scan or unroll > 1)
            apply = nn.remat(apply, policy=REMAT[remat], prevent_cse=prevent_cse, static_argnums=(4,))

        def rate(i: int | slice) -> Array | None:
            return jax.tree.map(lambda rates: rates[i], drop_rates)

        if self.scan:
            blocks = self.block(name="blocks")
            draws, captured = {"dropout": True}, {"intermediates": 0}
            if by_number:
                axes: dict[str, Any] = dict(variable_broadcast="params", variable_axes=captured, split_rngs=draws)
            else:
                axes = dict(variable_axes={"params": 0, **captured}, split_rngs={"params": True, **draws})
            run = nn.scan(
                apply,
                length=first,
                unroll=unroll,
                in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                **axes,
            )
            # The numbers are literals, which unrolled blocks turn into fixed slices.
            x, out = run(blocks, x, np.arange(first), rate(slice(first)), None)
            outs, last_block = [out], blocks
        else:
            blocks = [self.block(name=f"block_{i}") for i in range(self.depth)]
            outs = []
            for i in range(first):
                x, out = apply(blocks[i], x, i, rate(i), None)
                outs.append(_one_long(out))
            last_block = blocks[-1]
        if first == self.depth:
            return x, x[:, :reads], _joined(outs)

        last = (last_block, x, self.depth - 1, rate(-1))
        read, out_read = apply(*last, reads)
        every, out = apply(*last, None)  # for `out`; costs nothing where nobody reads it
        x, out = jax.tree.map(_with_others, (read, out_read), (every, out))
        return x, read, _joined([*outs, _one_long(out)])


def _batch_outermost(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Asks for that order in the memory of GPUs: XLA prefers the axis in front that a token was put on.

    It would keep the order through all blocks, and turn the tokens for every product and back. (JAX 0.10 cannot ask
    for it on several devices: each would get the whole batch.)
    """
    asks = jax.default_backend() == "gpu" and (jax.device_count() == 1 or jax.__version_info__ >= (0, 11))
    return with_layout_constraint(x, Layout((0, 1, 2))) if asks else x


def _one_long(out: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda x: x[None], out)


def _joined(outs: list[dict[str, Array]]) -> dict[str, Array]:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def _with_others(some: Float[Array, "... r d"], every: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
    """All tokens, of which the first ones are those of `some`."""
    return jnp.concatenate([some, every[..., some.shape[-2] :, :]], axis=-2)
