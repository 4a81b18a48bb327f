"""Images cut into flattened patches, and what cannot be cut."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from vit_flax.models.patches import patchify


def test_rectangular_patches_are_cut_row_by_row():
    x = jnp.arange(2 * 8 * 12 * 3, dtype=jnp.float32).reshape(2, 8, 12, 3)
    patches, grid = patchify(x, (2, 6))
    assert (patches.shape, grid) == ((2, 8, 36), (4, 2))
    np.testing.assert_array_equal(patches[1, 3], x[1, 2:4, 6:12].ravel())


@pytest.mark.parametrize(
    ("length", "given", "found"), [(9, None, (3, 3)), (6, None, (1, 6)), (6, (2, 3), (2, 3)), (9, (1, 9), (1, 9))]
)
def test_sequences_pass_through_with_the_grid_that_is_known(length, given, found):
    x = jnp.ones((2, length, 48))
    patches, grid = patchify(x, 4, given)
    assert patches is x
    assert grid == found


@pytest.mark.parametrize(
    ("shape", "patch", "words"),
    [((1, 30, 32, 3), 8, ["8x8", "30x32", "32x32"]), ((1, 32, 30, 3), (8, 16), ["8x16", "32x30", "32x32"])],
)
def test_a_patch_that_does_not_divide_the_image_is_named(shape, patch, words):
    with pytest.raises(ValueError, match="does not divide") as error:
        patchify(jnp.zeros(shape), patch)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(jnp.zeros((1, 6, 48)), 4, needs_grid=True), "6 patches is no square"),
        (lambda: patchify(jnp.zeros((1, 6, 48)), 4, (2, 2)), "holds 4 patches, but the sequence has 6"),
        (lambda: patchify(jnp.zeros((1, 8, 12, 3)), 4, (3, 2)), r"grid=\(3, 2\) was given.*\(2, 3\)"),
        (lambda: patchify(jnp.zeros((8, 12, 3)), 4), "needs a batch axis"),
    ],
)
def test_a_wrong_grid_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pixels_must_be_floating_point_numbers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    with pytest.raises(TypeError, match="found uint8"):
        patchify(jnp.zeros((1, 8, 8, 3), jnp.uint8), 4)
