"""Which parameters a rule applies to, by name and, on a stacked parameter, layer by layer.

A parameter under `blocks/` is stacked by `nn.scan`: its leading axis is the layer. Layer 3 of `blocks/norm1/scale` also
goes by the name that the loop gives it, `block_3/norm1/scale`, and the other way round. A regular expression is
compared with the whole of either name, so the same pattern selects the same weights in both layouts.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_flax.precision import wide
from vit_flax.tree_paths import name_of
from vit_flax.typing import Array, ArrayLike, PyTree

KERNELS = (r"(.*/)?kernel",)
# All that comes before the blocks.
EMBEDDINGS = r"(.*/)?(patch_embed|posemb|cls_token|dist_token|registers|pre_norm)/.*"
_STACK = re.compile(r"(^|/)blocks/")
_BLOCK = re.compile(r"(^|/)block_(\d+)/")


class ParamGroups(NamedTuple):
    """What applies to each parameter; every tree has the structure of the parameters.

    `decay` multiplies the weight decay (0: none), `factor` the learning rate. They and `trained` hold arrays that
    broadcast against the parameter: scalars, or one entry per layer.
    """

    stacked: PyTree
    decay: PyTree
    factor: PyTree
    trained: PyTree

    def without_frozen(self) -> "ParamGroups":
        """The same with a hole for each wholly frozen parameter, as `optax.masked` leaves it in the updates."""

        def cut(tree):
            return jax.tree.map(lambda t, x: x if t.any() else optax.MaskedNode(), self.trained, tree)

        return ParamGroups(*map(cut, self))


def make_groups(
    params: PyTree,
    *,
    decay_mask: Sequence[str] = KERNELS,
    decay_multipliers: Sequence[Sequence[Any]] = (),
    lr_multipliers: Sequence[Sequence[Any]] = (),
    layer_decay: ArrayLike | None = None,
    freeze: Sequence[str] = (),
    train_last_blocks: int | None = None,
) -> ParamGroups:
    """Resolves the patterns of the `optim` section on a tree of parameters (or of their shapes).

    Args:
        params: the parameters; only names and shapes are read.
        decay_mask: patterns of the parameters that weight decay applies to.
        decay_multipliers: pairs (pattern, factor) for their weight decay; the factors of all that match multiply.
        lr_multipliers: pairs (pattern, factor); the factors of all patterns that match multiply. A factor applies to
            the decay of its parameters too, as the learning rate of a parameter group does in torch.
        layer_decay: factor d of layer-wise learning-rate decay: d^(L+1-id), id 0 for the embeddings (all that
            comes before the blocks), i+1 for block i, L+1 for the rest (BEiT, arXiv:2106.08254; MAE, arXiv:2111.06377,
            table 9).
        freeze: patterns of the parameters that stay as they are.
        train_last_blocks: freezes the embeddings and all but the last so many blocks; 0 leaves the final norm, the
            pooling and the head.

    Raises:
        ValueError: a pattern that matches nothing (with the nearest names), more blocks to train than there are, a
            factor below 0, a decay multiplier for what does not decay, nothing left to train.
    """
    depth = _depths(params)
    if train_last_blocks is not None and not 0 <= train_last_blocks <= min(depth.values(), default=0):
        depths = ", ".join(map(str, sorted(depth.values()))) or "none"
        raise ValueError(f"{train_last_blocks=} must lie between 0 and the number of blocks, which is {depths}.")
    height = jax.tree_util.tree_map_with_path(lambda path, x: _layers_above(path, x, depth), params)
    frozen = any_match(freeze, params, "freeze")
    if train_last_blocks is not None:
        frozen = jax.tree.map(lambda f, h: f | (h > train_last_blocks), frozen, height)
    trained = jax.tree.map(np.logical_not, frozen)
    if not any(t.any() for t in jax.tree.leaves(trained)):
        raise ValueError(f"{freeze=} and {train_last_blocks=} leave nothing to train: freeze less.")
    factor = jax.tree.map(lambda t: t.astype(np.float32), trained)
    if layer_decay is not None:
        factor = jax.tree.map(lambda f, h: f * layer_decay ** h.astype(np.float32), factor, height)
    decays = any_match(decay_mask, params, "decay_mask")
    decay = _multiply(
        jax.tree.map(lambda hit: hit.astype(np.float32), decays), decay_multipliers, params, "decay_multipliers"
    )
    _check_decay(decays, decay_multipliers, params)
    return ParamGroups(
        stacked=jax.tree_util.tree_map_with_path(lambda path, _: bool(_STACK.search(name_of(path))), params),
        decay=decay,
        factor=_multiply(factor, lr_multipliers, params, "lr_multipliers"),
        trained=trained,
    )


def _multiply(factors: PyTree, multipliers: Sequence[Sequence[Any]], params: PyTree, what: str) -> PyTree:
    for pair in multipliers:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str) or _is_below_0(pair[1]):
            raise ValueError(f"{what}: expected pairs [pattern, factor of 0 or more], found {pair!r}.")
        hits = any_match([pair[0]], params, what)
        factors = jax.tree.map(lambda f, hit, by=pair[1]: f * (hit * by + ~hit), factors, hits)
    return factors


def _check_decay(decays: PyTree, multipliers: Sequence[Sequence[Any]], params: PyTree) -> None:
    for pattern, _ in multipliers:
        both = jax.tree.map(np.logical_and, any_match([pattern], params), decays)
        if not any(hit.any() for hit in jax.tree.leaves(both)):
            raise ValueError(
                f"decay_multipliers: nothing that {pattern!r} matches decays, so the factor would change nothing: "
                "decay_mask says what decays, give it the pattern too."
            )


def _is_below_0(factor: Any) -> bool:
    """Whether it is no number, or a negative one or NaN; a traced number may be anything."""
    return isinstance(factor, str | Sequence) or (isinstance(factor, int | float) and not factor >= 0)


class ParameterGroup(NamedTuple):
    """One line of the table of parameters that are treated alike.

    `lr_factor` is the smallest and the largest multiplier of the learning rate, `weight_decay` the one in force (before
    that multiplier); `layers` is "" outside the blocks.
    """

    pattern: str
    layers: str
    num_parameters: int
    lr_factor: tuple[float, float]
    weight_decay: float
    frozen: bool


def parameter_groups(params: PyTree, groups: ParamGroups, weight_decay: float) -> list[ParameterGroup]:
    """Lists how the parameters are treated, the same for stacked blocks and for a loop of blocks.

    Args:
        params: the parameters; only names and shapes are read.
        groups: of them, by `make_groups`.
        weight_decay: with 0 nothing decays.
    """
    layers: dict[str, list[tuple[int, int, float, float, bool]]] = {}  # name -> (layer, size, factor, decay, frozen)
    columns = (groups.factor, groups.decay, groups.trained)
    for (path, x), *cells in zip(jax.tree_util.tree_leaves_with_path(params), *map(jax.tree.leaves, columns)):
        names = _names(path, x)
        factor, decays, trained = (np.broadcast_to(np.ravel(cell), len(names)) for cell in cells)
        for i, name in enumerate(names):
            block = _BLOCK.search(name)
            decay = float(decays[i]) * weight_decay if trained[i] else 0.0
            treated = (float(factor[i]), decay, not trained[i])
            row = (int(block.group(2)) if block else -1, x.size // len(names), *treated)
            layers.setdefault(_stack_name(name), []).append(row)
    return _merge_alike(layers)


def _merge_alike(layers: dict[str, list[tuple[int, int, float, float, bool]]]) -> list[ParameterGroup]:
    alike: dict[Any, list[str]] = {}
    for name, rows in layers.items():
        rows.sort()
        profile = tuple((layer, *treated) for layer, _, *treated in rows)
        top = name[: block.end()] if (block := _STACK.search(name)) else name.split("/")[0] + "/"
        alike.setdefault((top, profile), []).append(name)
    table = []
    for (top, profile), names in alike.items():
        for decay, frozen in sorted({(d, f) for _, _, d, f in profile}):
            mine = [layer for layer, _, d, f in profile if (d, f) == (decay, frozen)]
            factors = [factor for layer, factor, _, _ in profile if layer in mine]
            size = sum(row[1] for name in names for row in layers[name] if row[0] in mine)
            table.append(
                ParameterGroup(_pattern(top, names), _ranges(mine), size, (min(factors), max(factors)), decay, frozen)
            )
    return sorted(table, key=_place)


def _place(group: ParameterGroup) -> tuple[bool, bool, int]:
    """Where a group stands in the table: embeddings, then blocks in their order, then the rest."""
    in_blocks = bool(_STACK.search(group.pattern))
    first_layer = int(re.split(r"[-,]", group.layers)[0]) if in_blocks else 0
    return not re.fullmatch(EMBEDDINGS, group.pattern), not in_blocks, first_layer


def _pattern(top: str, names: list[str]) -> str:
    """A pattern that matches the names, all of which start with `top`."""
    inside = [name[len(top) :].split("/") for name in names]
    modules = "|".join(sorted({parts[0] for parts in inside if len(parts) > 1}))
    leaves = "|".join(sorted({parts[-1] for parts in inside}))
    return top + (f"({modules})/.*" if modules else "") + (f"({leaves})" if "|" in leaves else leaves)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"; nothing for what is outside the blocks."""
    starts = [n for n in layers if n >= 0 and n - 1 not in layers]
    ends = [n for n in layers if n >= 0 and n + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def layer_norms(tree: PyTree) -> dict[str, Array]:
    """Norm of each top-level module and each block of a tree of gradients, updates or parameters.

    The keys, for example "patch_embed", "block_0" and "head", are the same for stacked blocks and for a loop of blocks;
    the squares add up to the square of `precision.norm(tree)`.
    """
    squares: dict[str, Array] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = _names(path, x)
        by_layer = jnp.sum(jnp.square(wide(x).reshape(len(names), -1)), axis=1)
        for i, name in enumerate(names):
            block = _BLOCK.search(name)
            key = name[: block.end() - 1] if block else name.split("/")[0]
            squares[key] = squares[key] + by_layer[i] if key in squares else by_layer[i]
    return {key: jnp.sqrt(square) for key, square in squares.items()}


def any_match(patterns: Sequence[str], params: PyTree, what: str = "patterns") -> PyTree:
    """For each parameter whether a pattern matches: a scalar, or per layer, shaped to broadcast.

    Args:
        patterns: regular expressions for whole names.
        params: the parameters; only names and shapes are read.
        what: the patterns are, for messages.

    Raises:
        ValueError: a pattern that matches nothing (with the nearest names), or that is no regular expression.
    """
    if isinstance(patterns, str):
        raise ValueError(f"{what}: expected a list of patterns, found the string {patterns!r}; write [{patterns!r}].")
    found = set()
    expressions = {pattern: _compile(pattern, what) for pattern in patterns}

    def hit(name: str) -> bool:
        hits = {p for p, e in expressions.items() if e.fullmatch(name) or e.fullmatch(_stack_name(name))}
        found.update(hits)
        return bool(hits)

    hits = jax.tree_util.tree_map_with_path(lambda path, x: _per_layer(hit, path, x), params)
    for pattern in set(patterns) - found:
        names = sorted({_stack_name(name_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)})
        near = difflib.get_close_matches(re.sub(r"[^\w/]", "", pattern), names, n=3, cutoff=0.0)
        raise ValueError(
            f"{what}: the pattern {pattern!r} matches no parameter; it is compared with the whole name. "
            f"Near names: {', '.join(near)}. The names of a single layer start with block_0/, block_1/ and so on."
        )
    return hits


def _compile(pattern: Any, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}: {pattern!r} is no regular expression ({error}).") from None


def _layers_above(path, x, depth: dict[str, int]) -> np.ndarray:
    """L + 1 - id of the parameter's layer: 0 for the head, 1 for the last block, L + 1 for the embeddings."""

    def above(name: str) -> int:
        if block := _BLOCK.search(name):
            return depth[name[: block.start()]] - int(block.group(2))
        if re.fullmatch(EMBEDDINGS, name):
            owners = [prefix for prefix in depth if name.startswith(prefix)]
            return depth[max(owners, key=len)] + 1 if owners else 1
        return 0

    return _per_layer(above, path, x)


def _depths(params: PyTree) -> dict[str, int]:
    """Number of blocks of each encoder, by the prefix of its names ("" for a plain ViT)."""
    depth: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if block := _BLOCK.search(_names(path, x)[-1]):
            prefix = block.string[: block.start()]
            depth[prefix] = max(depth.get(prefix, 0), int(block.group(2)) + 1)
    return depth


def _per_layer(of_name: Callable[[str], Any], path, x) -> np.ndarray:
    """The function of each layer's name along a leading axis; of the one name, as a scalar, if there are no layers."""
    values = np.asarray([of_name(name) for name in _names(path, x)])
    return values.reshape((-1,) + (1,) * (x.ndim - 1)) if _STACK.search(name_of(path)) else values.reshape(())


def _names(path, x) -> list[str]:
    name = name_of(path)
    if not _STACK.search(name):
        return [name]
    return [_STACK.sub(rf"\g<1>block_{i}/", name, count=1) for i in range(x.shape[0])]


def _stack_name(name: str) -> str:
    return _BLOCK.sub(r"\1blocks/", name)
