"""The one engine behind every family: walks a table forwards to read a checkpoint and backwards to write one."""

import itertools
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_flax.convert.source import Source, Tensor
from vit_flax.convert.table import Row
from vit_flax.models import ViT

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Flat = dict[str, np.ndarray]


def parameter_shapes(model: ViT, image_size: tuple[int, int], channels: int) -> Shapes:
    """Path -> shape and type of every parameter of a model, without computing any."""
    image = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables: Any = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, image)
    flat: Any = flatten_dict(variables["params"], sep="/")
    return flat


def read(source: Source, rows: Sequence[Row], shapes: Shapes) -> tuple[Flat, set[str]]:
    """Reads the parameters that the table finds in the file, in one pass over the bytes.

    Args:
      source: with its names spelled as in the table.
      rows: of the family.
      shapes: of the model's parameters; rows of other parameters are skipped.

    Returns: the parameters by path, and the names of the tensors that they came from.

    Raises: ValueError: the number of blocks, shapes or types disagree (all of them are listed), a tensor holds NaN or
      infinity, or cannot be read.
    """
    _check_depth(source, rows, shapes)
    jobs: list[tuple[Row, int | None, Tensor]] = []  # of a stacked parameter, one for each block
    wrong: list[str] = []
    params: Flat = {}
    for row in rows:
        if row.ours not in shapes or row.ours in params:
            continue
        shape = shapes[row.ours].shape
        indices = range(shape[0]) if "{i}" in row.theirs else [None]
        names = [row.theirs.replace("{i}", str(i)) for i in indices]
        if not all(name in source.tensors for name in names):
            continue
        tensors = [source.tensors[name] for name in names]
        target = shape if indices == [None] else shape[1:]
        if mismatches := [t for t in tensors if not _fits(row, t, target)]:
            wrong += [
                f"  {t.key}: {t.dtype} {list(t.shape)} in the file, and {row.ours} needs {list(target)}"
                for t in mismatches
            ]
            continue
        params[row.ours] = np.empty(shape, shapes[row.ours].dtype)
        jobs += [(row, i, t) for i, t in zip(indices, tensors, strict=True)]
    if wrong:
        more = [f"  and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise ValueError(
            "\n".join(
                [f"{source.path}: shapes or types disagree with the model that the file describes:", *wrong[:20], *more]
            )
            + "\nThe configuration (or the argument `fields`) does not belong to these weights, or the wrong family "
            "was named."
        )

    def run(job: tuple[Row, int | None, Tensor]) -> None:
        row, index, tensor = job
        _copy(source, row, tensor, params[row.ours] if index is None else params[row.ours][index])

    # NumPy lets go of the interpreter while it copies; more threads than a few only wait for memory.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(run, jobs))
    return params, {row.theirs.replace("{i}", str(i)) for row, i, _ in jobs}


def _check_depth(source: Source, rows: Sequence[Row], shapes: Shapes) -> None:
    """A wrong number of blocks would otherwise be an error about every tensor of a block."""
    in_blocks = [row for row in rows if "{i}" in row.theirs and row.ours in shapes]
    if not in_blocks:  # a format of stacked blocks
        return
    pattern = max((row.theirs for row in in_blocks), key=source.depth)
    found, wanted = source.depth(pattern), shapes[in_blocks[0].ours].shape[0]
    if found not in (0, wanted):
        raise ValueError(
            f"{source.path}: the file has {found} blocks ({pattern.replace('{i}', f'0 to {found - 1}')}) and the model "
            f"{wanted}. The configuration (or the argument `fields`) does not belong to these weights, or a part of "
            "them is missing: fetch both again. (To use some blocks only: fields={'depth': ...}, and ignore=[...] for "
            "the others.)"
        )


def _fits(row: Row, tensor: Tensor, target: tuple[int, ...]) -> bool:
    """Whether one tensor has the axes of one parameter, up to the grouping of neighbouring axes."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return False
    try:
        shape = row.op.read(np.broadcast_to(np.float32(0), tensor.shape)).shape
    except ValueError:  # the operation needs other axes
        return False

    def boundaries(sizes: tuple[int, ...]) -> set[int]:
        return set(itertools.accumulate(sizes, lambda a, b: a * b, initial=1))

    ours, theirs = boundaries(target), boundaries(shape)
    return max(ours) == max(theirs) and (ours <= theirs or theirs <= ours)


_STRIP = 64  # columns; so many rows of the file stay in the cache, and the inner loop is worth its start


def _copy(source: Source, row: Row, tensor: Tensor, target: np.ndarray) -> None:
    try:
        view = row.op.read(tensor.read())
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{source.path}: {tensor.key!r} cannot be read ({error}). Fetch the file again.") from error
    out = target.reshape(view.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # what float64 holds and float32 cannot becomes infinite
        if view.ndim == 2 and not view.flags.c_contiguous:
            for first in range(0, view.shape[1], _STRIP):
                out[:, first : first + _STRIP] = view[:, first : first + _STRIP]
        else:
            out[...] = view
        # The sum is as cheap as a pass can be, and a NaN or an infinity cannot hide in it.
        suspicious = not np.isfinite(np.add.reduce(out, axis=None, dtype=np.float32))
    if suspicious and (count := np.size(out) - np.count_nonzero(np.isfinite(out))):
        raise ValueError(
            f"{source.path}: {tensor.key!r} holds {count} values that are NaN or infinite in {out.dtype}. The "
            "weights are damaged, or were saved by a run that had diverged: take an older checkpoint."
        )


def write(params: Mapping[str, np.ndarray], rows: Sequence[Row]) -> tuple[Flat, set[str]]:
    """Writes parameters under the names and in the layout of a family.

    Args:
      params: by path, blocks stacked.
      rows: of the family; of rows that give one parameter two spellings, the first counts.

    Returns: the family's tensors by name, and the paths that no row took.
    """
    groups: dict[str, list[Row]] = {}
    taken: set[str] = set()
    for row in rows:
        if row.ours in params and (row.ours not in taken):
            groups.setdefault(row.theirs, []).append(row)
            taken.add(row.ours)
    tensors: Flat = {}
    for theirs, group in groups.items():
        if "{i}" not in theirs:
            tensors[theirs] = np.ascontiguousarray(group[0].op.write([params[r.ours] for r in group]))
            continue
        for i in range(len(params[group[0].ours])):
            parts = [params[row.ours][i] for row in group]
            tensors[theirs.replace("{i}", str(i))] = np.ascontiguousarray(group[0].op.write(parts))
    return tensors, set(params) - taken


def initialise(model: ViT, image_size: tuple[int, int], channels: int, paths: Sequence[str]) -> Flat:
    """Fresh values for some parameters, as `model.init` draws them from key 0; the others are not computed."""

    def some(key: Any) -> dict[str, Any]:
        image = jnp.zeros((1, *image_size, channels))
        flat = flatten_dict(model.init(key, image, train=False)["params"], sep="/")
        return {path: flat[path] for path in paths}

    return {path: np.asarray(value) for path, value in jax.jit(some)(jax.random.key(0)).items()}
