"""Which parameters a rule applies to, by name and, on a stacked parameter, layer by layer.

A parameter under `blocks/` is stacked by `nn.scan`: its leading axis is the layer. Layer 3 of `blocks/norm1/scale` also
goes by the name that the loop gives it, `block_3/norm1/scale`, and the other way round. A regular expression is
compared with the whole of either name, so the same pattern selects the same weights in both layouts.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_flax.typing import ArrayLike, PyTree

KERNELS = (r"(.*/)?kernel",)
EMBEDDINGS = r"(.*/)?(patch_embed|posemb|cls_token|registers)/.*"
_STACK = re.compile(r"(^|/)blocks/")
_BLOCK = re.compile(r"(^|/)block_(\d+)/")


class ParamGroups(NamedTuple):
    """What applies to each parameter; every tree has the structure of the parameters.

    `decay`, `factor` and `trained` hold arrays that broadcast against the parameter: scalars, or one entry per layer.
    """

    stacked: PyTree
    decay: PyTree
    factor: PyTree
    trained: PyTree


def make_groups(
    params: PyTree,
    *,
    decay_mask: Sequence[str] = KERNELS,
    lr_multipliers: Sequence[Sequence[Any]] = (),
    layer_decay: ArrayLike | None = None,
    freeze: Sequence[str] = (),
    train_last_blocks: int | None = None,
) -> ParamGroups:
    """Resolves the patterns of the `optim` section on a tree of parameters (or of their shapes).

    Args:
        params: the parameters; only names and shapes are read.
        decay_mask: patterns of the parameters that weight decay applies to.
        lr_multipliers: pairs (pattern, factor); the factors of all patterns that match multiply.
        layer_decay: factor d of layer-wise learning-rate decay: d^(L+1-id), id 0 for the embeddings, i+1 for block i,
            L+1 for the rest (MAE, arXiv:2111.06377, appendix A.1; BEiT, arXiv:2106.08254).
        freeze: patterns of the parameters that stay as they are.
        train_last_blocks: freezes the embeddings and all but the last so many blocks; 0 leaves the final norm, the
            pooling and the head.

    Raises:
        ValueError: a pattern that matches nothing (with the nearest names), more blocks to train than there are.
    """
    depth = _depths(params)
    if train_last_blocks is not None and not 0 <= train_last_blocks <= min(depth.values(), default=0):
        raise ValueError(f"{train_last_blocks=} must lie between 0 and the depth, found {sorted(depth.values())}.")
    height = jax.tree_util.tree_map_with_path(lambda path, x: _layers_above(_names(path, x), depth, x.ndim), params)
    factor = jax.tree.map(lambda h: np.ones_like(h, np.float32), height)
    if layer_decay is not None:
        factor = jax.tree.map(lambda h: layer_decay ** h.astype(np.float32), height)
    for pattern, multiplier in lr_multipliers:
        factor = jax.tree.map(lambda f, m, by=multiplier: f * (m * by + ~m), factor, _match(pattern, params))
    frozen = _match_any(freeze, params)
    if train_last_blocks is not None:
        frozen = jax.tree.map(lambda f, h: f | (h > train_last_blocks), frozen, height)
    return ParamGroups(
        stacked=jax.tree_util.tree_map_with_path(lambda path, _: bool(_STACK.search(_name(path))), params),
        decay=_match_any(decay_mask, params),
        factor=factor,
        trained=jax.tree.map(np.logical_not, frozen),
    )


def _match_any(patterns: Sequence[str], params: PyTree) -> PyTree:
    if isinstance(patterns, str):
        raise ValueError(f"Expected a list of patterns, found the string {patterns!r}; write [{patterns!r}].")
    nothing = jax.tree_util.tree_map_with_path(
        lambda path, x: _per_layer([False] * len(_names(path, x)), x.ndim), params
    )
    return jax.tree.map(lambda *hits: np.logical_or.reduce(hits), nothing, *(_match(p, params) for p in patterns))


def _match(pattern: str, params: PyTree) -> PyTree:
    regex = re.compile(pattern)

    def hit(name: str) -> bool:
        return bool(regex.fullmatch(name) or regex.fullmatch(_stack_name(name)))

    hits = jax.tree_util.tree_map_with_path(
        lambda path, x: _per_layer([hit(name) for name in _names(path, x)], x.ndim), params
    )
    if not any(h.any() for h in jax.tree.leaves(hits)):
        names = sorted({_stack_name(_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)})
        near = difflib.get_close_matches(re.sub(r"[^\w/]", "", pattern), names, n=3, cutoff=0.0)
        raise ValueError(
            f"The pattern {pattern!r} matches no parameter; a pattern has to match the whole name. "
            f"Near names: {', '.join(near)}. Names of one layer start with block_0/, block_1/, and so on."
        )
    return hits


def _layers_above(names: list[str], depth: dict[str, int], ndim: int) -> np.ndarray:
    """L + 1 - id of the parameter's layer: 0 for the head, 1 for the last block, L + 1 for the embeddings."""

    def above(name: str) -> int:
        if block := _BLOCK.search(name):
            return depth[name[: block.start()]] - int(block.group(2))
        if re.fullmatch(EMBEDDINGS, name):
            owners = [prefix for prefix in depth if name.startswith(prefix)]
            return depth[max(owners, key=len)] + 1 if owners else 1
        return 0

    return _per_layer([above(name) for name in names], ndim)


def _depths(params: PyTree) -> dict[str, int]:
    """Number of blocks of each encoder, by the prefix of its names ("" for a plain ViT)."""
    depth: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if block := _BLOCK.search(_names(path, x)[-1]):
            prefix = block.string[: block.start()]
            depth[prefix] = max(depth.get(prefix, 0), int(block.group(2)) + 1)
    return depth


def _names(path, x) -> list[str]:
    name = _name(path)
    if not _STACK.search(name):
        return [name]
    return [_STACK.sub(rf"\g<1>block_{i}/", name, count=1) for i in range(x.shape[0])]


def _per_layer(values: list, ndim: int) -> np.ndarray:
    """A scalar for one value, otherwise the values along a leading axis of an array of `ndim` axes."""
    return np.asarray(values[0]) if len(values) == 1 else np.reshape(np.asarray(values), (-1,) + (1,) * (ndim - 1))


def _stack_name(name: str) -> str:
    return _BLOCK.sub(r"\1blocks/", name)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
