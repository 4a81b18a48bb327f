"""The stack of blocks; the only place that knows about scan and rematerialisation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_flax.models.layers import SAVED
from vit_flax.models.posemb import Rotation
from vit_flax.typing import Array, Float

# What of a block is kept for the backward pass: all that it reads; only its input and the results of the linear layers
# and of the attention; those, in the memory of the host; or nothing but its input. The rest is computed again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
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
    """The stack of blocks, scanned or looped, with or without rematerialisation: same logits, gradients and `out`."""

    block: Callable[..., nn.Module]
    depth: int
    scan: bool
    unroll: int | None
    remat: str

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

        Returns: the tokens; those that the pooling reads; and every block's outputs, stacked on a leading axis [l]. Of
          the other tokens the last block computes keys and values, and the rest only if somebody reads it.
        """
        remat = self.remat
        if remat == "auto":
            # On CPUs the step waits for the memory that a scan stacks, more than for what is cheap to compute again.
            remat = "dots" if self.scan and jax.default_backend() == "cpu" else "none"
        # On an H200 a training step of B/16 spends a sixth of its time copying into and out of the stacks of a scan; in
        # twelve unrolled blocks it does not, and they compile as fast.
        unroll = self.unroll or (min(self.depth, 12) if jax.default_backend() == "gpu" else 1)

        def apply(block: nn.Module, x: Array, i: Any, rate: Any, reads: int | None) -> tuple[Array, dict[str, Array]]:
            """One block; where several are stacked, the i-th."""

            def one(block: nn.Module, x: Array) -> tuple[Array, dict[str, Array]]:
                return block(x, rate, rotation, reads)

            ith = one if i is None else nn.map_variables(one, "params", partial(jax.tree.map, lambda stack: stack[i]))
            return ith(block, x)

        if remat != "none":
            apply = nn.remat(apply, policy=REMAT[remat], prevent_cse=not self.scan or unroll > 1, static_argnums=(4,))

        def rate(i: int | slice) -> Array | None:
            return jax.tree.map(lambda rates: rates[i], drop_rates)

        n = self.depth if reads is None or self.is_initializing() else self.depth - 1
        if self.scan:
            blocks = self.block(name="blocks")
            scan = partial(nn.scan, apply, length=n, unroll=unroll, in_axes=(0, 0, nn.broadcast))  # pyright: ignore[reportArgumentType]
            if n == self.depth:
                numbers, run = None, scan(variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True})
            else:
                # By number: the stacks without the last block would be copies of nearly all parameters. The numbers are
                # literals, which unrolled blocks turn into fixed slices.
                numbers, run = np.arange(n), scan(variable_broadcast="params", split_rngs={"dropout": True})
            x, out = run(blocks, x, numbers, rate(slice(n)), None)
            outs, last = [out], (blocks, x, n, rate(-1))
        else:
            blocks = [self.block(name=f"block_{i}") for i in range(self.depth)]
            outs = []
            for i in range(n):
                x, out = apply(blocks[i], x, None, rate(i), None)
                outs.append(_one_long(out))
            last = blocks[-1], x, None, rate(-1)
        if n == self.depth:
            return x, x[:, :reads], _joined(outs)

        # The last block: first what is read, then all tokens; these cost nothing where nobody reads them.
        read, _ = some = apply(*last, reads)
        x, out = jax.tree.map(lambda a, b: jnp.concatenate([a, b[..., reads:, :]], axis=-2), some, apply(*last, None))
        return x, read, _joined([*outs, _one_long(out)])


def _one_long(out: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda x: x[None], out)


def _joined(outs: list[dict[str, Array]]) -> dict[str, Array]:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
