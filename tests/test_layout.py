"""The two layouts of the blocks' parameters, and the ways between them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.models import ViT
from vit_flax.models.layout import stack_blocks, unstack_blocks

DEPTH = 12  # enough for names whose alphabetical order is another


def looped(library, depth: int = DEPTH) -> dict:
    """Every number says its block, in the order of the alphabet, as a file of weights may have them."""

    def block(i):
        return {"mlp": {"kernel": library.full((2, 3), i, "float32")}, "scale": library.full((2,), -i, jnp.bfloat16)}

    blocks = {f"block_{i}": block(i) for i in sorted(range(depth), key=str)}
    return {"head": {"bias": library.ones(3)}, **blocks, "norm": library.zeros(2)}


def scanned(library) -> dict:
    kernel = library.stack([library.full((2, 3), i, "float32") for i in range(DEPTH)])
    scale = library.stack([library.full((2,), -i, jnp.bfloat16) for i in range(DEPTH)])
    blocks = {"mlp": {"kernel": kernel}, "scale": scale}
    return {"head": {"bias": library.ones(3)}, "blocks": blocks, "norm": library.zeros(2)}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (a.dtype, isinstance(a, np.ndarray)) == (e.dtype, isinstance(e, np.ndarray))
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize(
    ("convert", "source", "target"), [(stack_blocks, looped, scanned), (unstack_blocks, scanned, looped)]
)
def test_blocks_change_their_layout_in_the_order_of_their_numbers(convert, source, target, library):
    """NumPy stays NumPy and JAX stays JAX; dtypes stay; the source stays as it was."""
    given = source(library)
    assert_same(convert(given), target(library))
    assert_same(given, source(library))


@pytest.mark.parametrize("library", [np, jnp])
def test_there_and_back_is_the_same(library):
    assert_same(unstack_blocks(stack_blocks(looped(library))), looped(library))
    assert_same(stack_blocks(unstack_blocks(scanned(library))), scanned(library))


@pytest.mark.parametrize(("convert", "source"), [(stack_blocks, scanned), (unstack_blocks, looped)])
def test_parameters_that_have_the_layout_come_back_as_they_are(convert, source):
    params = source(np)
    converted = convert(params)
    assert converted is not params
    assert converted.keys() == params.keys()
    assert all(converted[name] is params[name] for name in params)


def test_only_numbered_blocks_are_blocks():
    others = {name: np.ones(2) for name in ("block", "block_", "block_a", "block_1_norm", "my_block_1", "blocks_1")}
    stacked = stack_blocks({**others, **looped(np, depth=2)})
    assert stacked.keys() == {*others, "head", "norm", "blocks"}
    assert all(stacked[name] is leaf for name, leaf in others.items())
    assert unstack_blocks(stacked).keys() == {*others, "head", "norm", "block_0", "block_1"}


def test_a_single_block_has_its_axis_too():
    params = looped(np, depth=1)
    assert stack_blocks(params)["blocks"]["mlp"]["kernel"].shape == (1, 2, 3)
    assert_same(unstack_blocks(stack_blocks(params)), params)


def test_layouts_are_those_of_the_looped_and_the_scanned_model():
    """Traced as well, as under jit."""

    def shapes(scan):
        model = ViT(num_classes=5, patch_size=4, width=8, depth=3, mlp_dim=4, num_heads=2, scan=scan)
        image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
        return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)["params"]

    assert jax.eval_shape(stack_blocks, shapes(scan=False)) == shapes(scan=True)
    assert jax.eval_shape(unstack_blocks, shapes(scan=True)) == shapes(scan=False)


def test_a_missing_block_is_named():
    params = {f"block_{i}": {"x": np.zeros(2)} for i in (0, 2)}
    with pytest.raises(ValueError, match="block_0 to block_1 of a looped model, found block_0, block_2"):
        stack_blocks(params)
