"""One case of the parity table: an architecture of some library with random weights, and what that library computes."""

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_flax.convert.resample import Grid
from vit_flax.typing import Float


@dataclass(frozen=True)
class Reference:
    """A model of the reference library, built and filled with random weights.

    Attributes:
      write: writes its checkpoint, exactly as the library saves one, into a folder that exists and is empty; returns
        what `load_pretrained` is to be given (the folder, or a file in it).
      apply: normalised images, float32, any of the case's sizes -> the library's output in evaluation mode, on the CPU,
        in float32 or better. The library's own way of taking another image size is used for sizes but the first.
      gradients: `(images, cotangent, folder)`: writes a checkpoint, in the format of `write`, whose tensors are the
        gradients of sum(cotangent * apply(images)) instead of the weights (zeros for what has none); so the conversion
        table maps gradients as it maps weights. Returns what `load_pretrained` is to be given. None: not compared.
    """

    write: Callable[[Path], Path]
    apply: Callable[[Float[np.ndarray, "b h w c"]], Float[np.ndarray, "b *m"]]
    gradients: Callable[[np.ndarray, np.ndarray, Path], Path] | None = None


@dataclass(frozen=True)
class Case:
    """One architecture of one family.

    Attributes:
      family: the key of `families.FAMILIES` that the checkpoint must be recognised as (without `load` naming it).
      name: of the architecture in the reference library, such as "vit_base_patch16_224".
      library: the package that is the reference, such as "timm"; its version goes into the table.
      build: seed -> the model. Imports the library; nothing else here does.
      image_sizes: rows and columns in pixels; the first is the checkpoint's own, the others test the resampling.
      output: which of our outputs is compared: "" for the model's result (logits, or features without a head), else a
        key of its `out`, such as "encoded".
      load: further arguments of `load_pretrained` that this checkpoint needs, such as {"family": "timm:NAME"}.
      full_size: a published size instead of a tiny one; takes seconds and up to a gigabyte, and gets the photograph.
      version: of the reference where it is no installed package (a commit that made a golden file); None to ask.
    """

    family: str
    name: str
    library: str
    build: Callable[[int], Reference]
    image_sizes: tuple[Grid, ...]
    output: str = ""
    load: Mapping[str, Any] = field(default_factory=dict)
    full_size: bool = False
    version: str | None = None

    def reference_version(self) -> str | None:
        """Of the library; None if it is not installed."""
        if self.version is not None:
            return self.version
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return None


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
    """Random weights under which every part of a model matters and activations keep the size 1.

    Initial weights would hide mistakes: biases, tokens and LayerScale are then nearly zero.

    Args:
      name: in the PyTorch state dict; `[out, in, ...]` for what is called a weight.
      shape: of the tensor.
      rng: to draw from.
    """
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) == 1:  # norms and LayerScale
        return 1 + 0.1 * noise
    if name.endswith("weight") and "position" not in name:
        return noise / np.float32(math.sqrt(math.prod(shape[1:])))
    return 0.5 * noise  # tokens and position tables
