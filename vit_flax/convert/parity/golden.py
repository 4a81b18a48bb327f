"""Cases whose reference is on no package index: its outputs are kept in tests/golden of a checkout."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vit_flax.convert.parity.case import Case, Reference

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"


@dataclass(frozen=True, kw_only=True)
class Golden(Reference):
    """A reference that knows its answer to one input only.

    Attributes:
      images: that input, `[b, h, w, c]`, normalised.
    """

    images: np.ndarray


def golden(family: str, name: str, library: str, version: str, size: tuple[int, int]) -> Case:
    """The case of `tests/golden/NAME.ckpt.npz` and `NAME.io.npz`."""
    return Case(family, name, library, partial(_build, name), (size,), version=version)


def _build(name: str, seed: int) -> Golden:
    kept = np.load(GOLDEN / f"{name}.io.npz")

    def write(folder: Path) -> Path:
        return Path(shutil.copy(GOLDEN / f"{name}.ckpt.npz", folder))

    answer = kept["logits" if "logits" in kept else "output"]
    return Golden(write=write, apply=lambda images: answer, images=kept["image"])
