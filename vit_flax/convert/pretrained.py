"""`load_pretrained`: from somebody's checkpoint to a model, its parameters and what its images must go through."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from vit_flax.convert import engine, resample
from vit_flax.convert.engine import Flat
from vit_flax.convert.families import find_family
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.report import Report, unexplained
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import Source, open_source
from vit_flax.convert.table import Family, Spec
from vit_flax.models import ViT


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint, ready for use.

    Attributes:
      model: computes what the family's reference implementation computes (`model.apply({"params": params}, images,
        train=False)`); `model.clone(drop_path=0.1)` changes what does not belong to the weights.
      params: NumPy arrays, blocks stacked.
      preprocess: what images must go through; None if the checkpoint does not say.
      class_names: one per logit; None if the checkpoint does not say.
      report: what became of every tensor.
    """

    model: ViT
    params: dict[str, Any]
    preprocess: Preprocess | None
    class_names: tuple[str, ...] | None
    report: Report


def load_pretrained(
    path: str | Path,
    *,
    family: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    ignore: Sequence[str] = (),
    patch_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    posemb_resize: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Loads a public ViT checkpoint, or one of ours.

    Args:
      path: an .npz or .safetensors file, or a folder with config.json beside the weights; an address with a scheme
        (hf://owner/name, gs://bucket/file) is fetched if the library for it is installed.
      family: a key of `families.FAMILIES`; found from the file where it is None. "timm:ARCHITECTURE" names the
        architecture of a bare timm file.
      num_classes: gives the model a new head of this size (zeros, as the published fine-tuning recipes) unless the
        stored one has it; a tanh layer in front of the old head goes with it. 0 removes the head; None keeps it.
      image_size: resamples the position table for this size in pixels, one number or (rows, columns).
      ignore: regular expressions of tensors to leave out and of parameters to initialise afresh.
      patch_size: resizes the patch embedding.
      channels: adapts the patch embedding to another number of image channels.
      posemb_resize: a key of `resample.METHODS` instead of the family's own.
      fields: of `ViT`, in place of those that the file describes, such as {"pool": "gap"} or {"dtype": "bfloat16"}.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: damaged or unknown file, ambiguous or wrong family, shapes that disagree with the configuration,
        NaN, tensors or parameters left over. The message names the file, the key and the remedy.
    """
    source = open_source(path)
    kind, source = find_family(source, family)
    spec = kind.describe(source)
    model = ViT(**{**spec.fields, **(fields or {})})
    stored_size = _image_size(spec, model)
    shapes = engine.parameter_shapes(model, stored_size, spec.channels)
    params, used = engine.read(source, kind.rows(model), shapes)
    for name, value in spec.constants.items():
        params[name] = np.full(shapes[name].shape, value, shapes[name].dtype)
    report = _account(source, kind, spec, params, used, shapes, kind.rows(model), ignore)
    return _adapt(
        Pretrained(model, params, spec.preprocess, spec.class_names, report),
        spec,
        shapes,
        _Wanted(num_classes, _pair(image_size), patch_size, channels, posemb_resize),
        stored_size,
    )


@dataclass(frozen=True)
class _Wanted:
    """What the caller wants to differ from the file."""

    num_classes: int | None
    image_size: Grid | None
    patch_size: int | Grid | None
    channels: int | None
    posemb_resize: str | None


def _pair(size: int | tuple[int, int] | Sequence[int] | None) -> Grid | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image_size(spec: Spec, model: ViT) -> Grid:
    """In pixels: from the position table, else as the pictures are prepared, else the usual 224 (or near it)."""
    patch = _pair(model.patch_size)
    assert patch is not None
    if spec.grid:
        return spec.grid[0] * patch[0], spec.grid[1] * patch[1]
    wanted = spec.preprocess.image_size if spec.preprocess else (224, 224)
    return tuple(max(side // p, 1) * p for side, p in zip(wanted, patch, strict=True))  # type: ignore[return-value]


def _account(
    source: Source,
    kind: Family,
    spec: Spec,
    params: Flat,
    used: set[str],
    shapes: engine.Shapes,
    rows: list[Any],
    ignore: Sequence[str],
) -> Report:
    """Explains every tensor and every parameter, or raises."""

    def excused(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in ignore)

    unused: dict[str, tuple[str, tuple[int, ...]]] = {}
    strange: dict[str, tuple[int, ...]] = {}
    for name, tensor in source.tensors.items():
        if name in used:
            continue
        if any(re.search(pattern, name) for pattern in spec.unused):
            unused[tensor.key] = ("no part of this model", tensor.shape)
        elif excused(tensor.key):
            unused[tensor.key] = ("excused by ignore", tensor.shape)
        else:
            strange[tensor.key] = tensor.shape
    looked_for = {row.ours: row.theirs for row in reversed(rows)}
    absent = {p: (looked_for.get(p, "nothing in this family"), s.shape) for p, s in shapes.items() if p not in params}
    missing = {p: s for p, (_, s) in absent.items() if excused(p)}
    absent = {p: v for p, v in absent.items() if p not in missing}
    if strange or absent:
        raise unexplained(source.path, strange, absent)
    return Report(
        path=source.path,
        family=kind.name,
        posemb_resize=spec.posemb_resize,
        loaded={p: w.shape for p, w in params.items() if p not in spec.constants},
        unused=unused,
        missing=missing,
        reinitialised={
            p: (f"{v:g}, which this family does not store", params[p].shape) for p, v in spec.constants.items()
        },
    )


def _adapt(stored: Pretrained, spec: Spec, shapes: engine.Shapes, wanted: _Wanted, stored_size: Grid) -> Pretrained:
    """Fits a model and its parameters to another head, image size, patch size or number of channels."""
    model, params = stored.model, dict(stored.params)
    new_model = _new_head(model, wanted.num_classes)
    if wanted.patch_size is not None:
        new_model = new_model.clone(patch_size=wanted.patch_size)
    channels = wanted.channels or spec.channels
    patch = _pair(new_model.patch_size)
    assert patch is not None
    image_size = wanted.image_size or stored_size
    for side, p in zip(image_size, patch, strict=True):
        if side % p:
            raise ValueError(f"{image_size=}: the patch size {patch} does not divide it; choose a multiple.")
    resampled: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

    def change(name: str, new: np.ndarray, how: str) -> None:
        if new is not params[name]:
            resampled[name] = (how, params[name].shape, new.shape)
            params[name] = new

    kernel, old_patch = params.get("patch_embed/kernel"), _pair(model.patch_size)
    if kernel is not None and old_patch and (patch != old_patch or channels != spec.channels):
        grid = kernel.reshape(*old_patch, spec.channels, -1)
        new = resample.adapt_channels(resample.resample_patches(grid, patch, spec.patch_resize), channels)
        how = f"{spec.patch_resize}, {spec.channels} -> {channels} channels"
        change("patch_embed/kernel", np.ascontiguousarray(new).reshape(-1, kernel.shape[-1]), how)
    new_grid = (image_size[0] // patch[0], image_size[1] // patch[1])
    method = wanted.posemb_resize or spec.posemb_resize
    if "posemb/table" in params and spec.grid:
        change("posemb/table", resample.resample_posemb(params["posemb/table"], spec.grid, new_grid, method), method)

    if new_model is not model:
        shapes = engine.parameter_shapes(new_model, image_size, channels)
        params = {p: w for p, w in params.items() if p in shapes and w.shape == shapes[p].shape}
    fresh = [p for p in shapes if p not in params]
    if fresh:
        params.update(engine.initialise(new_model, image_size, channels, fresh))
    report = stored.report
    dropped = {p: ("replaced with the head", w.shape) for p, w in stored.params.items() if p not in shapes}
    new_ones = {p: ("not in the file" if p in report.missing else "new head", params[p].shape) for p in fresh}
    kept = {p: v for p, v in report.reinitialised.items() if p in params and p not in fresh}
    preprocess = stored.preprocess and stored.preprocess.with_image_size(image_size).with_channels(channels)
    return Pretrained(
        model=new_model,
        params=unflatten_dict(params, sep="/"),
        preprocess=preprocess,
        class_names=stored.class_names if new_model.num_classes == model.num_classes else None,
        report=replace(
            report,
            posemb_resize=method,
            loaded={p: s for p, s in report.loaded.items() if p in params and p not in fresh},
            resampled=resampled,
            reinitialised={**kept, **new_ones},
            unused={**report.unused, **dropped},
        ),
    )


def _new_head(model: ViT, num_classes: int | None) -> ViT:
    new = None if num_classes == 0 else num_classes
    if num_classes is None or new == model.num_classes:
        return model
    # The tanh layer was trained for the old head; the reference implementations drop it in fine-tuning too.
    return model.clone(num_classes=new, representation_size=None)
