"""The two layouts of the blocks' parameters: stacked under `blocks`, leading axis [l], or `block_0`, `block_1`, ..."""

import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.typing import PyTree


def stack_blocks(params: Mapping[str, Any]) -> dict[str, PyTree]:
    """The parameters of a looped model as those of the scanned one; stacked ones come back as they are.

    Raises: ValueError: a block is missing.
    """
    names = sorted((n for n in params if re.fullmatch(r"block_\d+", n)), key=lambda n: int(n.split("_")[1]))
    if not names:
        return dict(params)
    if names != [f"block_{i}" for i in range(len(names))]:
        raise ValueError(f"Expected block_0 to block_{len(names) - 1} of a looped model, found {', '.join(names)}.")
    rest = {n: leaf for n, leaf in params.items() if n not in names}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: _stack(leaves), *(params[n] for n in names))}


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, PyTree]:
    """The parameters of a scanned model as those of the looped one; looped ones come back as they are."""
    if "blocks" not in params:
        return dict(params)
    rest = {n: leaf for n, leaf in params.items() if n != "blocks"}
    depth = len(jax.tree.leaves(params["blocks"])[0])
    return {**rest, **{f"block_{i}": jax.tree.map(itemgetter(i), params["blocks"]) for i in range(depth)}}


def _stack(leaves: tuple[Any, ...]) -> Any:
    return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
