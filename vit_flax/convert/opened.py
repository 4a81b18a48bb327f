"""A checkpoint that is open and not yet read: what it is, by its names, shapes and configuration alone."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_flax.convert import engine
from vit_flax.convert.families import find_family
from vit_flax.convert.report import nearest
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import Source, open_source
from vit_flax.convert.table import Family, Row, Spec
from vit_flax.models import ViT


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which only names, shapes and configuration have been read.

    Attributes:
      family: that it belongs to.
      source: with its names spelled as in the family's table.
      spec: what the family makes of it.
      model: that computes what the reference implementation computes.
      rows: the family's table for that model.
      image_size: rows and columns in pixels of the stored position table, or near what the pictures are prepared to.
      shapes: of the model's parameters, at that size.
    """

    family: Family
    source: Source
    spec: Spec
    model: ViT
    rows: list[Row]
    image_size: Grid
    shapes: engine.Shapes


def open_checkpoint(path: str | Path, *, family: str | None = None, fields: Mapping[str, Any] | None = None) -> Opened:
    """Opens a checkpoint and finds out what it is; arguments and errors as of `load_pretrained`."""
    if not (fields or {}).get("scan", True):
        raise ValueError(
            "fields={'scan': False}: parameters are loaded with the blocks stacked. Take model.clone(scan=False) and "
            "vit_flax.models.layout.unstack_blocks(params) afterwards."
        )
    known = [field.name for field in dataclasses.fields(ViT) if field.name not in ("parent", "name")]
    for name in fields or {}:
        if name not in known:
            raise ValueError(f"fields={dict(fields or {})}: ViT has no field {name!r}{nearest(name, known)}.")
    kind, source = find_family(open_source(path), family)
    if not fields:
        return _interpret(kind, source, {})
    try:
        return _interpret(kind, source, fields)
    except ValueError as error:
        _interpret(kind, source, {})  # if this fails, too, it is not for the fields
        reason = error.__cause__ or error
        raise ValueError(f"fields={dict(fields)} makes no model of {source.path}: {reason}") from error


def _interpret(kind: Family, source: Source, fields: Mapping[str, Any]) -> Opened:
    try:
        spec = kind.describe(source)
        model = ViT(**{**spec.fields, **fields})
        image_size = _image_size(spec, model)
        shapes = engine.parameter_shapes(model, image_size, spec.channels)
        return Opened(kind, source, spec, model, kind.rows(model), image_size, shapes)
    except ValueError as error:
        raise error if source.path in str(error) else ValueError(f"{source.path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{source.path}: the configuration beside the weights describes no {kind.name} model "
            f"({type(error).__name__}: {error}). Fetch it again, or name another family."
        ) from error


def _image_size(spec: Spec, model: ViT) -> Grid:
    """In pixels: from the position table, else as the pictures are prepared, else the usual 224 (or near it)."""
    patch = model.patch_shape
    if spec.grid:
        return spec.grid[0] * patch[0], spec.grid[1] * patch[1]
    known = spec.evaluation or spec.preprocess
    wanted = known.image_size if known else (224, 224)
    return tuple(max(side // p, 1) * p for side, p in zip(wanted, patch, strict=True))  # type: ignore[return-value]
