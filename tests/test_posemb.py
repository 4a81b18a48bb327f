"""Positions: tables and rotations against their definitions, written out channel by channel in Python's own floats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.models.posemb import FIXED_TABLES, ROPES, LearnedPositions, rotate, sincos2d

GRID = (2, 3)
PLACES = [(row, column) for row in range(GRID[0]) for column in range(GRID[1])]
E = 16  # channels of a head; with 8 the periods are whole numbers, which nothing rounds

# The exponents of the fixed tables: k of `bands`.
EXPONENTS = {
    "sincos2d": lambda k, bands: k / (bands - 1) if bands > 1 else 0.0,  # arXiv:2104.02057
    "sincos2d_mae": lambda k, bands: k / bands,  # arXiv:2111.06377
}


def wave(row: int, column: int, channel: int, width: int, exponent) -> float:
    bands = width // 4
    quarter, k = divmod(channel, bands)
    function = (math.sin, math.cos)[quarter % 2]
    return function((column if quarter < 2 else row) / 10_000 ** exponent(k, bands))


@pytest.mark.parametrize("width", [4, 12])
@pytest.mark.parametrize("name", FIXED_TABLES)
def test_fixed_table_is_its_definition(name, width):
    table = FIXED_TABLES[name](GRID, width)
    expected = [[wave(*place, channel, width, EXPONENTS[name]) for channel in range(width)] for place in PLACES]
    np.testing.assert_allclose(table, expected, rtol=1e-6, atol=1e-7)
    assert (type(table), table.dtype) == (np.ndarray, np.float32)


@pytest.mark.parametrize("width", [6, 9, 2])
def test_a_width_that_is_no_multiple_of_4_is_refused(width):
    with pytest.raises(ValueError, match=f"a width that is a multiple of 4, got width={width}"):
        sincos2d(GRID, width)


def test_learned_positions_are_added_in_the_dtype_of_the_tokens_and_kept_in_their_own():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4)), jnp.bfloat16)
    module = LearnedPositions(jnp.dtype("float32"), table_init=jax.nn.initializers.constant(1 / 3))
    y, variables = module.init_with_output(jax.random.key(0), x)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), variables) == {"params": {"table": ((1, 6, 4), jnp.float32)}}
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x + jnp.bfloat16(1 / 3))


# Rotations. Channels come in planes: two channels that are turned by the same angle.


def bfloat16(x: float) -> float:
    """`x` to eight binary digits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def dinov3_angle(row: int, column: int, plane: int, round_period=float) -> float:
    axis, k = divmod(plane, E // 4)
    centre = ((row + 0.5) / GRID[0], (column + 0.5) / GRID[1])[axis] * 2 - 1
    return 2 * math.pi * centre / round_period(100 ** (k / (E // 4)))


def eva_angle(row: int, column: int, plane: int) -> float:
    axis, k = divmod(plane, E // 4)
    return (16 * row / GRID[0], 16 * column / GRID[1])[axis] / 10_000 ** (k / (E // 4))


def halves(plane: int) -> tuple[int, int]:
    return plane, plane + E // 2


def neighbours(plane: int) -> tuple[int, int]:
    return 2 * plane, 2 * plane + 1


ANGLES_AND_PLANES = {
    "dinov3": (dinov3_angle, halves),  # arXiv:2508.10104
    "dinov3_bf16": (lambda *place: dinov3_angle(*place, bfloat16), halves),
    "eva": (eva_angle, neighbours),  # arXiv:2303.11331
}


@pytest.mark.parametrize("name", ROPES)
def test_rotation_holds_the_angle_of_every_channel(name):
    angle, channels = ANGLES_AND_PLANES[name]
    expected = np.zeros((len(PLACES), E))
    for n, place in enumerate(PLACES):
        for plane in range(E // 2):
            expected[n, channels(plane)] = angle(*place, plane)
    rotation = ROPES[name].angles(GRID, E)
    np.testing.assert_allclose(rotation.sin, np.sin(expected), atol=1e-6)
    np.testing.assert_allclose(rotation.cos, np.cos(expected), atol=1e-6)
    assert {table.dtype for table in rotation} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ROPES)
def test_rotating_is_multiplying_by_complex_numbers_and_leaves_the_tokens_in_front_alone(name):
    angle, channels = ANGLES_AND_PLANES[name]
    x = np.random.default_rng(0).standard_normal((2, 2 + len(PLACES), 3, E))
    expected = x.copy()
    for n, place in enumerate(PLACES, start=2):
        for plane in range(E // 2):
            re, im = channels(plane)
            turned = (x[:, n, :, re] + 1j * x[:, n, :, im]) * np.exp(1j * angle(*place, plane))
            expected[:, n, :, re], expected[:, n, :, im] = turned.real, turned.imag
    np.testing.assert_allclose(rotate(jnp.float32(x), ROPES[name].angles(GRID, E), name), expected, atol=2e-6)


@pytest.mark.parametrize("name", ROPES)
def test_bfloat16_queries_are_rotated_in_float32_and_rounded_once(name):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 3, E)), jnp.bfloat16)
    rotation = ROPES[name].angles(GRID, E)
    exact = rotate(x.astype(jnp.float32), rotation, name)
    np.testing.assert_array_equal(rotate(x, rotation, name), exact.astype(jnp.bfloat16))
