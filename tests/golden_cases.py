"""Reads the golden files: tiny checkpoints, images, and what the reference computed of them."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_flax.convert import Pretrained
from vit_flax.convert.source import read_safetensors
from vit_flax.models import ViT
from vit_flax.models.patches import patchify

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of float32 outputs of size 1


def folders(prefix: str) -> list[str]:
    """Names of the checkpoints that are folders."""
    return sorted(path.name for path in GOLDEN.glob(f"{prefix}*") if path.is_dir())


def expected(name: str) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Image size -> image and the reference's output; the size of the checkpoint comes first."""
    arrays = np.load(GOLDEN / f"{name}.io.npz")
    sizes = [key.removeprefix("image:") for key in arrays if key.startswith("image:")]
    return {
        (int(h), int(w)): (arrays[f"image:{h}x{w}"], arrays[f"output:{h}x{w}"])
        for h, w in (size.split("x") for size in sizes)
    }


def output(pretrained: Pretrained, image: np.ndarray) -> np.ndarray:
    """What our model computes, in full precision; one program for all image sizes with as many patches."""
    model = pretrained.model
    patches, grid = patchify(jax.numpy.asarray(image), model.patch_size)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_run(model, pretrained.params, patches, grid if model.rope else None))


@partial(jax.jit, static_argnums=(0, 3))
def _run(model: ViT, params: Any, patches: jax.Array, grid: Any) -> jax.Array:
    return model.apply({"params": params}, patches, train=False, grid=grid)[0]  # pyright: ignore[reportReturnType]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The contents of model.safetensors, by name."""
    return {name: tensor.read() for name, tensor in read_safetensors(folder / "model.safetensors").items()}


def assert_same_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Same names and same bits."""
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
