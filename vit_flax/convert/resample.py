"""Resampling of position tables and patch embeddings, exactly as each family's reference implementation does it.

A resize along one axis is a matrix `[new, old]`; a resize of a grid is one such matrix per axis. That reproduces
PyTorch, Pillow, SciPy and `jax.image` to rounding error, rectangles included.
"""

import math
from dataclasses import dataclass

import numpy as np

from vit_flax.typing import Float, Shaped

Grid = tuple[int, int]


@dataclass(frozen=True)
class Method:
    """One way to resize.

    Attributes:
      cubic: piecewise cubic interpolation; otherwise linear.
      antialias: widens the kernel when shrinking and drops the taps outside (Pillow); otherwise edges are repeated.
      align_corners: the outer samples keep their places; otherwise the outer edges do.
      offset_px: added to the output size where the scale is computed (Meta's DINOv2).
    """

    cubic: bool
    antialias: bool = False
    align_corners: bool = False
    offset_px: float = 0.0


METHODS: dict[str, Method] = {
    "bicubic": Method(cubic=True),  # torch.nn.functional.interpolate; transformers
    "bicubic_antialias": Method(cubic=True, antialias=True),  # timm; DINOv2 with registers
    "bicubic_offset": Method(cubic=True, offset_px=0.1),  # Meta's DINOv2 without registers
    "bilinear": Method(cubic=False),  # timm, from Google's .npz
    "bilinear_antialias": Method(cubic=False, antialias=True),  # FlexiViT, NaFlex: jax.image.resize
    "bilinear_align_corners": Method(cubic=False, align_corners=True),  # scipy.ndimage.zoom(order=1); Google
}


def resample_posemb(
    table: Float[np.ndarray, "1 old d"], old_grid: Grid, new_grid: Grid, method: str
) -> Float[np.ndarray, "1 new d"]:
    """Resamples a learned position table to another grid; the table comes back untouched if the grids are equal.

    Args:
      table: one vector per patch, row-major over the grid; prefix tokens are not in it.
      old_grid: rows and columns of the table.
      new_grid: rows and columns wanted.
      method: a key of `METHODS`.

    Raises: ValueError: the table does not have the size of `old_grid`, or the method is unknown.
    """
    n, d = table.shape[1:]
    if n != math.prod(old_grid):
        raise ValueError(f"A position table of {n} patches is not a grid of {old_grid[0]}x{old_grid[1]}.")
    if tuple(old_grid) == tuple(new_grid):
        return table
    new = resize(table.reshape(*old_grid, d), new_grid, method)
    return new.reshape(1, -1, d).astype(table.dtype)


def resample_patches(
    kernel: Float[np.ndarray, "h w c d"], new_size: Grid, method: str
) -> Float[np.ndarray, "new_h new_w c d"]:
    """Resizes a patch embedding so that resized patches keep their embeddings as nearly as possible.

    The pseudo-inverse of the resize that turns an old patch into a new one, not that resize itself.

    Args:
      kernel: of the patch embedding.
      new_size: rows and columns of a new patch, in pixels.
      method: a key of `METHODS`.
    Source: Beyer et al. 2023, FlexiViT, section 3.4 (arXiv:2212.08013).
    """
    if tuple(kernel.shape[:2]) == tuple(new_size):
        return kernel
    rows, columns = (
        np.linalg.pinv(axis_weights(old, new, method).T) for old, new in zip(kernel.shape[:2], new_size, strict=True)
    )
    return np.einsum("ai,bj,ijcd->abcd", rows, columns, kernel, optimize=True).astype(kernel.dtype)


def adapt_channels(kernel: Float[np.ndarray, "h w old d"], channels: int) -> Float[np.ndarray, "h w new d"]:
    """Fits a patch embedding to another number of channels: the sum for one, otherwise repeated and scaled down.

    Source: `adapt_input_conv` of timm 1.0.31 (described, not copied).
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % old] * kernel.dtype.type(old / channels)


def resize(grid: Shaped[np.ndarray, "h w d"], size: Grid, method: str) -> Float[np.ndarray, "new_h new_w d"]:
    """Resizes a grid of vectors, or an image, in float64."""
    rows, columns = (axis_weights(old, new, method) for old, new in zip(grid.shape[:2], size, strict=True))
    return np.swapaxes(_along_rows(columns, np.swapaxes(_along_rows(rows, grid), 0, 1)), 0, 1)


def _along_rows(weights: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The matrix times the first axis. A row of it has few taps, which for a photograph is a twentieth of the work."""
    out = np.empty((len(weights), *grid.shape[1:]))
    for new, row in enumerate(weights):
        taps = np.flatnonzero(row)
        first, last = taps[0], taps[-1] + 1
        out[new] = np.tensordot(row[first:last], grid[first:last].astype(np.float64), axes=1)
    return out


def axis_weights(old: int, new: int, method: str) -> Float[np.ndarray, "new old"]:
    """The matrix that resizes one axis.

    Args:
      old: number of samples.
      new: number of samples wanted.
      method: a key of `METHODS`.

    Raises: ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown resampling method {method!r}: expected one of {', '.join(METHODS)}.")
    how = METHODS[method]
    index = np.arange(new)
    if how.align_corners:
        centre, stretch = index * (old - 1) / max(new - 1, 1), 1.0
    else:
        ratio = old / (new + how.offset_px)
        centre, stretch = (index + 0.5) * ratio - 0.5, max(ratio, 1.0) if how.antialias else 1.0
    if not (how.cubic or how.antialias or how.align_corners):
        centre = np.maximum(centre, 0.0)  # PyTorch clamps the centre before it looks for the two neighbours

    outside = math.ceil(2 * stretch) + 1
    taps = np.arange(-outside, old + outside)
    distance = abs(taps - centre[:, None]) / stretch
    # PyTorch and Pillow take a = -1/2 where they antialias and PyTorch -3/4 where it does not.
    weights = _cubic(distance, a=-0.5 if how.antialias else -0.75) if how.cubic else np.clip(1 - distance, 0, None)
    if how.antialias:
        weights = weights[:, outside:-outside]
    else:
        edges = np.zeros((len(taps), old))
        edges[np.arange(len(taps)), np.clip(taps, 0, old - 1)] = 1
        weights = weights @ edges
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
