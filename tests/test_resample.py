"""The resize matrices against what PyTorch 2.13, SciPy 1.17 and timm 1.0.31 computed (`golden/make_resample.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.convert import resample

GOLDEN = np.load(Path(__file__).parent / "golden" / "resample.npz")
CASES = [name for name in GOLDEN if name.startswith("grid:")]


@pytest.mark.parametrize("case", CASES)
def test_resize_is_that_of_the_reference(case):
    _, method, size = case.split(":")
    new = tuple(int(n) for n in size.split("x"))
    np.testing.assert_allclose(resample.resize(GOLDEN["grid"], new, method), GOLDEN[case], atol=1e-13)


def test_every_method_has_a_reference():
    assert {case.split(":")[1] for case in CASES} == set(resample.METHODS)


@pytest.mark.parametrize("size", [(4, 4), (12, 20)])
def test_patches_are_resized_by_the_pseudo_inverse(size):
    kernel = GOLDEN["kernel"]
    new = resample.resample_patches(kernel, size, "bicubic_antialias")
    np.testing.assert_allclose(new, GOLDEN[f"kernel:{size[0]}x{size[1]}"], atol=2e-5)  # timm computes in float32
    assert new.dtype == kernel.dtype


def test_enlarged_patches_embed_enlarged_images_alike():
    kernel = GOLDEN["kernel"].astype(np.float64)
    patch = np.random.default_rng(0).standard_normal((8, 8, 3))
    larger = resample.resize(patch, (16, 16), "bilinear")
    new = resample.resample_patches(kernel, (16, 16), "bilinear")
    np.testing.assert_allclose(
        np.einsum("hwc,hwcd->d", larger, new), np.einsum("hwc,hwcd->d", patch, kernel), atol=1e-10
    )


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_are_adapted_as_timm_does(channels):
    new = resample.adapt_channels(GOLDEN["kernel"], channels)
    np.testing.assert_allclose(new, GOLDEN[f"channels:{channels}"], atol=1e-6)


@pytest.mark.parametrize("method", ["bicubic_antialias", "bilinear_antialias"])
def test_antialiased_resize_is_that_of_jax(method):
    grid = GOLDEN["grid"].astype(np.float32)
    ours = resample.resize(grid, (3, 9), method)
    theirs = jax.image.resize(jnp.asarray(grid), (3, 9, grid.shape[-1]), "cubic" if "cubic" in method else "linear")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_table_of_the_same_grid_is_untouched():
    table = GOLDEN["grid"].reshape(1, -1, GOLDEN["grid"].shape[-1])
    assert resample.resample_posemb(table, (7, 5), (7, 5), "bicubic_offset") is table


def test_wrong_grid_and_method_are_errors():
    table = np.zeros((1, 35, 2))
    with pytest.raises(ValueError, match="35 patches is not a grid of 6x6"):
        resample.resample_posemb(table, (6, 6), (7, 7), "bicubic")
    with pytest.raises(ValueError, match=r"Unknown resampling method .lanczos..*bicubic_antialias"):
        resample.resample_posemb(table, (7, 5), (7, 7), "lanczos")
