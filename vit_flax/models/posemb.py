"""Position information: tables that are added to the tokens, and rotations that are applied to queries and keys."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_flax.typing import Array, Float

Grid = tuple[int, int]  # (rows, columns) in patches


class LearnedPositions(nn.Module):
    """A learned table of one vector per patch position, added to the patch embeddings.

    The class token is not in this table; where it has a position of its own, that lives in `ClassToken`.
    Source: Dosovitskiy et al. 2021, eq. (1) (arXiv:2010.11929).
    """

    param_dtype: jnp.dtype
    table_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Adds the table."""
        _, n, d = x.shape
        table = self.param("table", self.table_init, (1, n, d), self.param_dtype)
        return x + table.astype(x.dtype)


def sincos2d(grid: Grid, width: int, *, last_frequency_included: bool = True) -> Float[np.ndarray, "n d"]:
    """Fixed sine and cosine table over a grid, `[sin x, cos x, sin y, cos y]` along the width.

    Two tables carry this name in the literature. With `last_frequency_included` the exponent runs over
    `k / (d/4 - 1)`, so that the slowest wave has period 2 pi * 10000 (MoCo v3, big_vision); without it over `k / (d/4)`
    (MAE, and the 1-d table of Vaswani et al.).

    Args:
      grid: rows and columns, in patches.
      width: of the tokens; a multiple of 4.
      last_frequency_included: which of the two definitions.

    Raises: ValueError: `width` is not a multiple of 4.
    Source: Chen et al. 2021 (arXiv:2104.02057); He et al. 2022 (arXiv:2111.06377).
    """
    if width % 4:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4, got {width=}.")
    bands = width // 4
    exponent = np.arange(bands) / (max(bands - 1, 1) if last_frequency_included else bands)
    omega = 10_000.0**-exponent
    y, x = (index.reshape(-1, 1) * omega for index in np.mgrid[: grid[0], : grid[1]])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


FIXED_TABLES: dict[str, Callable[[Grid, int], np.ndarray]] = {
    "sincos2d": lambda grid, width: sincos2d(grid, width, last_frequency_included=True),
    "sincos2d_mae": lambda grid, width: sincos2d(grid, width, last_frequency_included=False),
}


class Rotation(NamedTuple):
    """Sines and cosines `[n, e]` of the angle by which each channel of a head is rotated at each position."""

    sin: Array
    cos: Array


def rope_dinov3(grid: Grid, head_dim: int, *, period_dtype: Any = np.float64) -> Rotation:
    """Axial rotations over patch centres in [-1, 1], bands `[y, x]` tiled twice (the halves are rotated).

    Args:
      grid: rows and columns, in patches.
      head_dim: of the attention.
      period_dtype: to which the periods of the waves are rounded, such as bfloat16 in Meta's own files.

    Source: Siméoni et al. 2025 (arXiv:2508.10104); facebookresearch/dinov3 layers/rope_position_encoding.py.
    """
    periods = (100.0 ** (np.arange(head_dim // 4) * 4 / head_dim)).astype(period_dtype).astype(np.float64)
    centres = (2 * (np.arange(n) + 0.5) / n - 1 for n in grid)
    y, x = np.meshgrid(*centres, indexing="ij")
    bands = [2 * np.pi * axis.reshape(-1, 1) / periods for axis in (y, x)]
    return _rotation(np.tile(np.concatenate(bands, axis=1), 2))


def rope_eva(grid: Grid, head_dim: int) -> Rotation:
    """Axial rotations over indices rescaled to the 16 x 16 grid of pre-training, each angle used by a channel pair.

    Source: Fang et al. 2023, EVA-02 (arXiv:2303.11331).
    """
    omega = 10_000.0 ** -(np.arange(head_dim // 4) * 4 / head_dim)
    y, x = np.meshgrid(*(np.arange(n) / n * 16 for n in grid), indexing="ij")
    bands = [axis.reshape(-1, 1) * omega for axis in (y, x)]
    return _rotation(np.repeat(np.concatenate(bands, axis=1), 2, axis=1))


def _rotation(angles: np.ndarray) -> Rotation:
    # float32 whatever the compute dtype: bfloat16 angles moved the output of a toy model by 5e-3.
    return Rotation(jnp.asarray(np.sin(angles), jnp.float32), jnp.asarray(np.cos(angles), jnp.float32))


def _swap_halves(x: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _swap_pairs(x: Array) -> Array:
    return jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)


class Rope(NamedTuple):
    """Angles of a grid and head_dim, and the quarter turn that says which channels form a plane."""

    angles: Callable[[Grid, int], Rotation]
    quarter_turn: Callable[[Array], Array]


ROPES: dict[str, Rope] = {
    "dinov3": Rope(rope_dinov3, _swap_halves),  # transformers, timm
    # Meta: the published weights hold rounded periods.
    "dinov3_bf16": Rope(partial(rope_dinov3, period_dtype=jnp.bfloat16), _swap_halves),
    "eva": Rope(rope_eva, _swap_pairs),
}


def rotate(x: Float[Array, "b n k e"], rotation: Rotation, rope: str) -> Float[Array, "b n k e"]:
    """Rotates the patch tokens of queries or keys; tokens in front of them (class token, registers) pass unchanged.

    Args:
      x: queries or keys.
      rotation: for the last `len(rotation.sin)` tokens.
      rope: a key of `ROPES`; says which channels form a plane.
    """
    prefix = x.shape[1] - rotation.sin.shape[0]
    patches = x[:, prefix:].astype(jnp.float32)
    sin, cos = (table[None, :, None, :] for table in rotation)
    rotated = patches * cos + ROPES[rope].quarter_turn(patches) * sin
    return jnp.concatenate([x[:, :prefix], rotated.astype(x.dtype)], axis=1)
