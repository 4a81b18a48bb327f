"""What a checkpoint is, from its names, shapes and configuration alone: `python -m vit_flax.convert --describe IN`."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from vit_flax.convert.opened import Opened
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.save import architecture
from vit_flax.convert.source import Source, Tensor
from vit_flax.models import ViT
from vit_flax.models.heads import POOLS


def describe(opened: Opened) -> str:
    """Family, model, preprocessing, classes and every tensor with the parameters that it becomes, as text."""
    facts = {
        "path": opened.source.path,
        "family": f"{opened.family.name}: {opened.family.about}",
        "model": model_fields(opened.model),
        "image": f"{opened.image_size[0]}x{opened.image_size[1]}, {opened.spec.channels} channels",
        "preprocess": str(opened.spec.evaluation or preprocessing(opened.spec.preprocess)),
        "positions": f"resampled by {opened.spec.posemb_resize!r} for another image size",
        "classes": classes(opened),
    }
    return "\n".join([*(f"{name:<11} {text}" for name, text in facts.items()), "", tensor_table(opened)])


def model_fields(model: ViT) -> str:
    """The fields of a model that are not the defaults of `ViT`, as one would write them."""
    ours = architecture(model)
    defaults = {f.name: f.default for f in dataclasses.fields(model)}
    defaults |= {"head_dim": model.width // model.num_heads, "class_token": POOLS[model.pool].needs_class_token}
    defaults["class_token_position"] = ours["class_token"] and model.posemb == "learned"
    defaults["layer_scale"] = False
    return ", ".join(f"{name}={value!r}" for name, value in ours.items() if value != defaults[name])


def preprocessing(preprocess: Preprocess | None) -> str:
    """In words."""
    if preprocess is None:
        return "the checkpoint does not say"
    size = "x".join(map(str, preprocess.image_size))
    if preprocess.crop_fraction is None:
        geometry = f"stretch to {size}"
    else:
        how = "shorter side to" if preprocess.keep_aspect else "stretch to"
        geometry = f"{how} {size} / {preprocess.crop_fraction:g}, central crop of {size}"
    smooth = "" if preprocess.antialias else ", without antialiasing"
    return f"{geometry} ({preprocess.filter}{smooth}), mean {preprocess.mean}, std {preprocess.std}"


def classes(opened: Opened) -> str:
    """How many, and the first names."""
    if opened.model.num_classes is None:
        return "no head: the model gives features"
    names = opened.spec.class_names
    first = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ", without names"
    kinds = {"sigmoid": "; each has a probability of its own", "none": "; they are numbers, as of a regression"}
    return f"{opened.model.num_classes}{first}{kinds.get(opened.spec.probabilities, '')}"


def tensor_table(opened: Opened) -> str:
    """One line per tensor, or per tensor of a block: name, count, type, shape, and what it becomes."""
    become: dict[str, list[str]] = {}
    for row in opened.rows:
        ours = become.setdefault(row.theirs, [])
        if row.ours not in ours:
            ours.append(row.ours)

    def target(pattern: str) -> str:
        if pattern in become:
            return " + ".join(become[pattern])
        return "unused" if any(re.search(p, pattern) for p in opened.spec.unused) else "unknown"

    groups = _grouped(opened.source.tensors, become)
    return _columns([*line, target(line[0])] for line in _lines(groups))


def raw_table(source: Source) -> str:
    """The tensors of a file that no family wants."""
    return _columns(_lines(_grouped(source.tensors, {})))


def _lines(groups: Mapping[str, Sequence[Tensor]]) -> Iterator[tuple[str, ...]]:
    for pattern, tensors in groups.items():
        dtypes = sorted({str(t.dtype) for t in tensors})
        shapes = sorted({str(list(t.shape)) for t in tensors})
        count = f"x{len(tensors)}" if len(tensors) > 1 else ""
        yield pattern, count, " or ".join(dtypes), " or ".join(shapes)


def _columns(lines: Iterable[Sequence[str]]) -> str:
    table = [list(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def _grouped(tensors: Mapping[str, Tensor], patterns: Mapping[str, object]) -> dict[str, list[Tensor]]:
    """Tensors by the pattern of the table that they match; what matches none, by its name with numbers left out."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        block = re.sub(r"(?<=[._/])\d+(?=[./])", "{i}", name, count=1)
        if name not in patterns and block not in patterns:
            block = re.sub(r"(?<=[._/])\d+(?=[./])", "{i}", name)
        groups.setdefault(name if name in patterns else block, []).append(tensor)
    return groups


def digest(source: Source) -> str:
    """Tells weights apart without reading much of them: covers all names, types and shapes, and the smaller tensors."""
    found = hashlib.sha256()
    for name in sorted(source.tensors):
        tensor = source.tensors[name]
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        if math.prod(tensor.shape) <= 2**19:  # biases and scales, stacked or not: training moves every one of them
            found.update(np.ascontiguousarray(tensor.read()).tobytes())
    return found.hexdigest()[:16]
