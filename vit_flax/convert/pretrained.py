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
from vit_flax.convert.opened import Opened, open_checkpoint
from vit_flax.convert.preprocess import Evaluation, Preprocess
from vit_flax.convert.report import Report, unexplained
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import Source
from vit_flax.convert.table import Row, Spec
from vit_flax.models import ViT
from vit_flax.models.patches import both_sides


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint, ready for use.

    Attributes:
      model: computes what the family's reference implementation computes (`model.apply({"params": params}, images,
        train=False)`); `model.clone(drop_path=0.1)` changes what does not belong to the weights.
      params: NumPy arrays, blocks stacked.
      preprocess: what images must go through; None if the checkpoint does not say, or says more than can be said so.
      class_names: one per logit; None if the checkpoint does not say.
      report: what became of every tensor.
      image_size: rows and columns in pixels that the model is for.
      channels: of the images.
      evaluation: of a run of ours: what its evaluation pictures went through; None for any other checkpoint.
      probabilities: what the logits become probabilities by, a key of `table.PROBABILITIES`: "sigmoid" where each class
        has its own, "none" for numbers that are no classes, else (also if the checkpoint does not say) "softmax".
    """

    model: ViT
    params: dict[str, Any]
    preprocess: Preprocess | None
    class_names: tuple[str, ...] | None
    report: Report
    image_size: Grid
    channels: int
    evaluation: Evaluation | None = None
    probabilities: str = "softmax"


def load_pretrained(
    path: str | Path,
    *,
    family: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    ignore: Sequence[str] = (),
    new_head: bool = False,
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
      ignore: regular expressions of tensors to leave out and of parameters to initialise afresh; naming either side of
        a pair is enough.
      new_head: replaces the head even if the stored one has `num_classes` outputs.
      patch_size: resizes the patch embedding.
      channels: adapts the patch embedding to another number of image channels.
      posemb_resize: a key of `resample.METHODS` instead of the family's own.
      fields: of `ViT`, in place of those that the file describes, such as {"pool": "gap"} or {"dtype": "bfloat16"}.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: damaged or unknown file, ambiguous or wrong family, shapes that disagree with the configuration,
        NaN, tensors or parameters left over. The message names the file, the key and the remedy.
    """
    return load_opened(
        open_checkpoint(path, family=family, fields=fields),
        num_classes=num_classes,
        image_size=image_size,
        ignore=ignore,
        new_head=new_head,
        patch_size=patch_size,
        channels=channels,
        posemb_resize=posemb_resize,
    )


def load_opened(opened: Opened, *, ignore: Sequence[str] = (), **changes: Any) -> Pretrained:
    """Loads a checkpoint that is open already; `ignore`, the changes and the errors are those of `load_pretrained`."""
    wanted = _Wanted(**changes)
    wanted.check()
    _check_patterns(ignore)
    source, spec, model, shapes = opened.source, opened.spec, opened.model, opened.shapes
    excused = _Excused(ignore, opened.rows, source)
    kept = {name: tensor for name, tensor in source.tensors.items() if not excused.tensor(name)}
    rows = [row for row in opened.rows if not excused.parameter(row.ours)]
    params, used = engine.read(replace(source, tensors=kept), rows, shapes)
    for name, value in spec.constants.items():
        params[name] = np.full(shapes[name].shape, value, shapes[name].dtype)
    report = _account(opened, params, used, excused)
    return _adapt(
        Pretrained(
            model=model,
            params=params,
            preprocess=spec.preprocess,
            class_names=spec.class_names,
            report=report,
            image_size=opened.image_size,
            channels=spec.channels,
            evaluation=spec.evaluation,
            probabilities=spec.probabilities,
        ),
        spec,
        shapes,
        wanted,
    )


@dataclass(frozen=True)
class _Wanted:
    """What the caller wants to differ from the file."""

    num_classes: int | None = None
    new_head: bool = False
    image_size: int | Grid | None = None
    patch_size: int | Grid | None = None
    channels: int | None = None
    posemb_resize: str | None = None

    def check(self) -> None:
        """Raises a ValueError that names the argument that makes no sense."""
        for name, least in (("num_classes", 0), ("channels", 1), ("image_size", 1), ("patch_size", 1)):
            value = getattr(self, name)
            sides = value if isinstance(value, Sequence) else () if value is None else (value,)
            whole = all(isinstance(n, int | np.integer) and n >= least for n in sides)
            if not whole or (isinstance(value, Sequence) and len(value) != 2):
                pairs = ", or two of them: rows and columns" if name.endswith("size") else ""
                raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more{pairs}.")
        if self.posemb_resize is not None and self.posemb_resize not in resample.METHODS:
            known = ", ".join(resample.METHODS)
            raise ValueError(f"posemb_resize={self.posemb_resize!r} is unknown: expected one of {known}.")


def _check_patterns(ignore: Sequence[str]) -> None:
    if isinstance(ignore, str):  # its letters, one by one, would match every name
        raise ValueError(f"ignore={ignore!r}: expected a list of regular expressions, such as {[ignore]}.")
    for pattern in ignore:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"ignore: {pattern!r} is no regular expression ({error}).") from error


class _Excused:
    """Which tensors and parameters `ignore` leaves out: those it names, and the other side of each pair."""

    def __init__(self, patterns: Sequence[str], rows: Sequence[Row], source: Source):
        self._patterns = patterns
        self._keys = {name: tensor.key for name, tensor in source.tensors.items()}
        self._theirs: dict[str, list[str]] = {}
        self._ours: dict[str, list[str]] = {}
        for row in rows if patterns else ():
            count = source.depth(row.theirs) if "{i}" in row.theirs else 1
            for name in (row.theirs.replace("{i}", str(i)) for i in range(count)):
                if name in self._keys:
                    self._theirs.setdefault(row.ours, []).append(name)
                    self._ours.setdefault(name, []).append(row.ours)

    def _named(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self._patterns)

    def tensor(self, name: str) -> bool:
        """Whether a tensor is left out, by its name in the table."""
        ours = self._ours.get(name, [])
        return self._named(self._keys[name]) or (bool(ours) and all(map(self._named, ours)))

    def parameter(self, path: str) -> bool:
        """Whether a parameter is initialised afresh."""
        theirs = [self._keys[name] for name in self._theirs.get(path, [])]
        return self._named(path) or (bool(theirs) and all(map(self._named, theirs)))


def _account(opened: Opened, params: Flat, used: set[str], excused: _Excused) -> Report:
    """Explains every tensor and every parameter, or raises."""
    source, spec = opened.source, opened.spec
    unused: dict[str, tuple[str, tuple[int, ...]]] = {}
    strange: dict[str, tuple[int, ...]] = {}
    for name, tensor in source.tensors.items():
        if name in used:
            continue
        if any(re.search(pattern, name) for pattern in spec.unused):
            unused[tensor.key] = ("no part of this model", tensor.shape)
        elif excused.tensor(name):
            unused[tensor.key] = ("excused by ignore", tensor.shape)
        else:
            strange[tensor.key] = tensor.shape
    looked_for = {row.ours: row.theirs for row in reversed(opened.rows)}
    absent = {
        p: (looked_for.get(p, "nothing in this family"), s.shape) for p, s in opened.shapes.items() if p not in params
    }
    missing = {p: s for p, (_, s) in absent.items() if excused.parameter(p)}
    absent = {p: v for p, v in absent.items() if p not in missing}
    if strange or absent:
        keys = (tensor.key for tensor in source.tensors.values() if tensor.key not in strange)
        raise unexplained(source.path, strange, absent, [*keys, *(p for p in opened.shapes if p not in absent)])
    return Report(
        path=source.path,
        family=opened.family.name,
        posemb_resize=spec.posemb_resize,
        patch_resize=spec.patch_resize,
        loaded={p: w.shape for p, w in params.items() if p not in spec.constants},
        unused=unused,
        missing=missing,
        reinitialised={
            p: (f"{v:g}, which this family does not store", params[p].shape) for p, v in spec.constants.items()
        },
    )


def _adapt(stored: Pretrained, spec: Spec, shapes: engine.Shapes, wanted: _Wanted) -> Pretrained:
    """Fits a model and its parameters to another head, image size, patch size or number of channels."""
    model, params = stored.model, dict(stored.params)
    new_model = _new_head(model, wanted.num_classes)
    if wanted.patch_size is not None:
        new_model = new_model.clone(patch_size=wanted.patch_size)
    channels = wanted.channels or spec.channels
    patch = new_model.patch_shape
    image_size = stored.image_size if wanted.image_size is None else both_sides(wanted.image_size)
    for side, p in zip(image_size, patch, strict=True):
        if side % p:
            raise ValueError(f"{image_size=}: the patch size {patch} does not divide it; choose a multiple.")
    resampled: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

    def change(name: str, new: np.ndarray, how: str) -> None:
        if new is not params[name]:
            resampled[name] = (how, params[name].shape, new.shape)
            params[name] = new

    kernel, old_patch = params.get("patch_embed/kernel"), model.patch_shape
    if kernel is not None and (patch != old_patch or channels != spec.channels):
        grid = kernel.reshape(*old_patch, spec.channels, -1)
        new = resample.adapt_channels(resample.resample_patches(grid, patch, spec.patch_resize), channels)
        how = f"{spec.patch_resize}, {spec.channels} -> {channels} channels"
        change("patch_embed/kernel", np.ascontiguousarray(new).reshape(-1, kernel.shape[-1]), how)
    new_grid = (image_size[0] // patch[0], image_size[1] // patch[1])
    method = wanted.posemb_resize or spec.posemb_resize
    if "posemb/table" in params and spec.grid:
        change("posemb/table", resample.resample_posemb(params["posemb/table"], spec.grid, new_grid, method), method)

    if wanted.new_head:
        params = {p: w for p, w in params.items() if p.split("/")[0] not in ("head", "head_dist")}
    if new_model is not model:
        shapes = engine.parameter_shapes(new_model, image_size, channels)
        params = {p: w for p, w in params.items() if p in shapes and w.shape == shapes[p].shape}
    fresh = [p for p in shapes if p not in params]
    if fresh:
        params.update(engine.initialise(new_model, image_size, channels, fresh))
    report, same_classes = stored.report, new_model.num_classes == model.num_classes
    dropped = {p: ("replaced with the head", w.shape) for p, w in stored.params.items() if p not in shapes}
    new_ones = {p: ("not in the file" if p in report.missing else "new head", params[p].shape) for p in fresh}
    kept = {p: v for p, v in report.reinitialised.items() if p in params and p not in fresh}
    preprocess = stored.preprocess and stored.preprocess.with_image_size(image_size).with_channels(channels)
    return replace(
        stored,
        model=new_model,
        params=unflatten_dict(params, sep="/"),
        preprocess=preprocess,
        image_size=image_size,
        channels=channels,
        class_names=stored.class_names if same_classes else None,
        probabilities=stored.probabilities if same_classes else "softmax",
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
