"""Images as sequences of flattened patches."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from vit_flax.models.posemb import Grid
from vit_flax.typing import Array, Float


def patchify(
    images: Float[Array, "b h w c"] | Float[Array, "b n f"],
    patch_size: int | tuple[int, int],
    grid: Grid | None = None,
    *,
    needs_grid: bool = False,
) -> tuple[Float[Array, "b n f"], Grid]:
    """Cuts images into flattened patches (row, column, channel; channel fastest); sequences pass through.

    Args:
      images: pixels, or patches already cut.
      patch_size: side in pixels, or (rows, columns).
      grid: of a sequence; found from its length where that is a square number.
      needs_grid: whether a sequence of unknown grid is an error.

    Returns: patches and their grid.

    Raises:
      ValueError: the patch does not divide the image; the grid is unknown or does not fit; another number of axes.
      TypeError: pixels that are no floating-point numbers.

    >>> patches, grid = patchify(jnp.zeros((1, 512, 512, 3)), 32)
    >>> patches.shape, grid
    ((1, 256, 3072), (16, 16))
    """
    ph, pw = both_sides(patch_size)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"Expected pixels normalised to floating-point numbers, found {images.dtype}.")
    if images.ndim == 3:
        return images, _grid_of_sequence(images.shape, (ph, pw), grid, needs_grid)
    if images.ndim != 4:
        raise ValueError(f"Expected images [b, h, w, c] or sequences of patches [b, n, f], found {images.shape}.")
    b, h, w, c = images.shape
    if h % ph or w % pw:
        raise ValueError(
            f"The patch size {ph}x{pw} does not divide the image size {h}x{w}. Resize the images "
            f"(nearest: {max(round(h / ph), 1) * ph}x{max(round(w / pw), 1) * pw}) or choose another patch size."
        )
    found = (h // ph, w // pw)
    if grid is not None and tuple(grid) != found:
        raise ValueError(f"{grid=} was given, but images of {h}x{w} cut by {ph}x{pw} make a grid of {found}.")
    x = images.reshape(b, found[0], ph, found[1], pw, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, found[0] * found[1], ph * pw * c), found


def both_sides(size: int | Sequence[int]) -> Grid:
    """Rows and columns of a size that may be one number, for a square."""
    rows, columns = size if isinstance(size, Sequence) else (size, size)
    return rows, columns


def _grid_of_sequence(shape: tuple[int, ...], patch: Grid, grid: Grid | None, needs_grid: bool) -> Grid:
    _, n, f = shape
    if f % (patch[0] * patch[1]):
        raise ValueError(
            f"A sequence of patches has {patch[0]}x{patch[1]}xc numbers per patch, found {f} in {shape}. "
            "(A single image needs a batch axis.)"
        )
    if grid is None:
        side = math.isqrt(n)
        if needs_grid and side * side != n:
            raise ValueError(
                f"A sequence of {n} patches is no square; these position embeddings need `grid=(rows, columns)`."
            )
        return (side, side) if side * side == n else (1, n)
    if grid[0] * grid[1] != n:
        raise ValueError(f"{grid=} holds {grid[0] * grid[1]} patches, but the sequence has {n}.")
    return grid
