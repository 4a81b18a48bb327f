"""What a family of checkpoints is: a table of rows (our name, their name, an invertible operation) and a few values.

Names on our side are paths in the parameter tree with the blocks stacked, such as `blocks/attention/query/kernel`
`[l, d, k, e]`. On their side `{i}` stands for the number of a block. Several rows may share one foreign tensor (a fused
projection, a position table with a slot for the class token): each takes its part, and the writer puts them together.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from vit_flax.convert.preprocess import Evaluation, Preprocess
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import Source, Tensor
from vit_flax.models import ViT
from vit_flax.models.patches import both_sides

# What logits become probabilities by, as the loss that they were trained with has it: the classes share one picture, or
# each is there or not by itself, or ("none") they are numbers and no classes, as a regression has them.
PROBABILITIES: dict[str, Callable[[Any], Any]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "none": lambda logits: logits,
}


@dataclass(frozen=True)
class Op:
    """An invertible change of layout.

    Attributes:
      read: their tensor -> a view of it in our order of axes; the engine groups axes as our parameter has them.
      write: our parameters, one per row that shares the tensor -> their tensor.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One parameter of ours, and the foreign tensor (or part of one) that it comes from."""

    ours: str
    theirs: str
    op: Op


@dataclass(frozen=True)
class Spec:
    """What one file holds, as far as its family can tell from names, shapes and configuration.

    Attributes:
      fields: of `ViT`, for the model that computes what the reference implementation computes.
      grid: rows and columns of the stored position table; None if there is none.
      channels: of the image.
      posemb_resize: the key of `resample.METHODS` by which the reference implementation resizes the table.
      patch_resize: the same for the patch embedding.
      preprocess: what the images must have gone through; None if the file does not say.
      evaluation: of a run of ours: what its evaluation pictures went through.
      class_names: None if the file does not say.
      probabilities: a key of `PROBABILITIES`; "softmax" if the file does not say.
      unused: patterns of tensors that belong to the file but not to this model (decoders, text towers).
      constants: parameters of ours that the family does not store, and their value.
    """

    fields: dict[str, Any]
    channels: int
    posemb_resize: str
    patch_resize: str
    grid: Grid | None = None
    preprocess: Preprocess | None = None
    evaluation: Evaluation | None = None
    class_names: tuple[str, ...] | None = None
    probabilities: str = "softmax"
    unused: tuple[str, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outgoing:
    """What the configuration files of a written checkpoint are made from."""

    model: ViT
    params: Mapping[str, np.ndarray]
    channels: int
    image_size: Grid
    preprocess: Preprocess | None
    class_names: tuple[str, ...] | None
    posemb_resize: str
    patch_resize: str
    probabilities: str


@dataclass(frozen=True)
class Family:
    """Everything that sets one kind of checkpoint apart.

    Attributes:
      name: as in `load_pretrained(family=...)`.
      about: one line for people.
      matches: whether a file is of this kind, by its spelled names and its configuration.
      describe: reads the specification off a file that matches.
      rows: the table, for a model.
      spell: brings the spellings that occur to the one of the table.
      extra: tensors that the format demands and our models lack, such as a mask token, by name.
      config: the contents of the files to write beside the weights, by name; None if the family is only read.
      token_positions: whether the class token has a slot in the family's position table; None if both occur; a
        function of the model where that decides.
      suffix: of the file that is written.
    """

    name: str
    about: str
    matches: Callable[[Source], bool]
    describe: Callable[[Source], Spec]
    rows: Callable[[ViT], list[Row]]
    spell: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    extra: Callable[[Outgoing], dict[str, np.ndarray]] = lambda _: {}
    config: Callable[[Outgoing], dict[str, dict[str, Any]]] | None = None
    token_positions: bool | Callable[[ViT], bool | None] | None = None
    suffix: str = ".safetensors"

    def wants_token_positions(self, model: ViT) -> bool | None:
        """`token_positions`, for a model."""
        return self.token_positions(model) if callable(self.token_positions) else self.token_positions


SAME = Op(lambda w: w, lambda ws: ws[0])
FLAT = Op(lambda w: w, lambda ws: ws[0].reshape(-1))  # a vector on their side, whatever its axes on ours
TOKEN = Op(lambda w: w.reshape(1, 1, -1), lambda ws: ws[0].reshape(-1))
# Their kernels are [out, in]. Ours split the inner axis into heads, on the side where the heads are.
LINEAR = Op(lambda w: w.T, lambda ws: ws[0].reshape(len(ws[0]), -1).T)
LINEAR_FROM_HEADS = Op(lambda w: w.T, lambda ws: ws[0].reshape(-1, ws[0].shape[-1]).T)


def convolution(patch_size: int | tuple[int, int], *, channels_last: bool = False) -> Op:
    """The patch embedding: a convolution on their side, a matrix over flattened patches on ours."""
    ph, pw = both_sides(patch_size)

    def grouped(ws: Sequence[np.ndarray]) -> np.ndarray:
        return ws[0].reshape(ph, pw, -1, ws[0].shape[-1])

    if channels_last:
        return Op(lambda w: w, grouped)
    return Op(lambda w: w.transpose(2, 3, 1, 0), lambda ws: grouped(ws).transpose(3, 2, 0, 1))


def renaming(*pairs: tuple[str, str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A `spell` that applies regular expressions to every name, in order."""

    def spell(tensors: Mapping[str, Any]) -> dict[str, Any]:
        spelled = {}
        for name, tensor in tensors.items():
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            spelled[name] = tensor
        return spelled

    return spell


def part(index: int, count: int, op: Op) -> Op:
    """The `index`-th of `count` equal parts along their first axis; the writer joins the parts in the table's order."""
    return Op(
        lambda w: op.read(np.split(w, count)[index]),
        lambda ws: np.concatenate([op.write([w]) for w in ws]),
    )


def slots(first: int, last: int | None, *, flat: bool = False) -> Op:
    """Positions `first` to `last` of a table `[1, n, d]`, or `[n, d]` where `flat`."""
    return Op(
        lambda w: w.reshape(1, *w.shape[-2:])[:, first:last],
        lambda ws: np.concatenate(ws, axis=1)[0] if flat else np.concatenate(ws, axis=1),
    )


def linear(ours: str, theirs: str, op: Op = LINEAR) -> list[Row]:
    """Kernel and bias of a PyTorch linear layer."""
    return [Row(f"{ours}/kernel", f"{theirs}.weight", op), Row(f"{ours}/bias", f"{theirs}.bias", FLAT)]


def norm(ours: str, theirs: str) -> list[Row]:
    """Scale and bias of a PyTorch LayerNorm."""
    return [Row(f"{ours}/scale", f"{theirs}.weight", SAME), Row(f"{ours}/bias", f"{theirs}.bias", SAME)]


def fused(ours: str, theirs: str, names: Sequence[str], *, join: str = ".") -> list[Row]:
    """Several of our linear layers that are one layer of theirs, one below the other."""
    return [
        Row(f"{ours}/{name}/{leaf}", f"{theirs}{join}{suffix}", part(index, len(names), op))
        for leaf, suffix, op in (("kernel", "weight", LINEAR), ("bias", "bias", FLAT))
        for index, name in enumerate(names)
    ]


def positions(model: ViT, theirs: str, *, flat: bool = False) -> list[Row]:
    """A position table, and the slots in front of the grid's for tokens that have a position of their own."""
    tokens = [t for t, there in (("cls_token", model.has_class_token), ("dist_token", model.dist_token)) if there]
    tokens = tokens if model.class_token_position else []
    rows = [Row(f"{t}/position", theirs, slots(i, i + 1, flat=flat)) for i, t in enumerate(tokens)]
    return [*rows, Row("posemb/table", theirs, slots(len(tokens), None, flat=flat))]
