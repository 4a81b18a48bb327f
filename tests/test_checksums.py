"""Checksums: what they see, and that they do not depend on where the arrays are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_flax.checksums import checksums, differences, rows_of, shapes
from vit_flax.tree_paths import by_path


def one(array) -> int:
    return checksums({"x": jnp.asarray(array)})["x"]


NORMAL = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_sees_a_flipped_bit(bit):
    changed = NORMAL.copy()
    changed.view(np.uint32)[10, 10] ^= np.uint32(1 << bit)
    assert one(changed) != one(NORMAL)


def test_sees_exchanged_values_and_rows():
    changed = NORMAL.copy()
    changed[0, 0], changed[0, 1] = NORMAL[0, 1], NORMAL[0, 0]
    assert one(changed) != one(NORMAL)
    assert one(NORMAL[::-1]) != one(NORMAL)
    assert one(NORMAL.reshape(-1)) == one(NORMAL)  # the shape is compared elsewhere


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("size", [256, 384, 1024])
def test_sees_constant_blocks_that_became_zeros(value, size):
    """As a scale of LayerNorm whose chunk is lost: a weighted sum of the words misses it."""
    assert one(np.full(size, value, np.float32)) != one(np.zeros(size, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"])
def test_every_kind_of_leaf(dtype):
    array = jnp.arange(12).reshape(3, 4).astype(dtype)
    changed = array.at[1, 2].set(jnp.zeros((), dtype))
    assert one(changed) != one(array)


def test_random_keys_and_scalars():
    assert one(jax.random.key(0)) != one(jax.random.key(1))
    assert one(np.int32(1)) != one(np.int32(2))


def test_is_the_same_on_any_mesh():
    devices = jax.devices()
    assert len(devices) == 8, "this test needs several devices"
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape(4, 2), ("data", "model"))
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec("model", "data")):
        assert one(jax.device_put(NORMAL, NamedSharding(mesh, spec))) == one(NORMAL)


def test_names_and_differences():
    tree = {"a": {"b": jnp.zeros((2, 3), jnp.bfloat16)}, "c": (jnp.zeros(1), jnp.zeros(2))}
    assert list(by_path(tree)) == ["a/b", "c/0", "c/1"]
    assert shapes(tree)["a/b"] == [[2, 3], "bfloat16"]
    assert differences({"x": 1, "y": 2}, {"y": 3, "z": 4}) == {"x": (1, "absent"), "y": (2, 3), "z": ("absent", 4)}


def test_differences_of_nested_and_long_values():
    """The key of the data that differs is named, and what differs of a thousand class names."""
    there = {"data": {"train": {"class_names": [f"class {i}" for i in range(1000)], "digest": "a"}, "kept": 1}}
    names = [*there["data"]["train"]["class_names"]]
    names[500] = "dog"
    diff = differences(there, {"data": {"train": {"class_names": names, "digest": "b"}, "kept": 1}})
    assert diff.keys() == {"data.train.class_names", "data.train.digest"}
    long, short = rows_of(diff, "there", "here").splitlines()
    assert "ss 499', 'class 500'" in long
    assert "ss 499', 'dog', " in long
    assert len(long) < 300
    assert short == "  data.train.digest: there 'a', here 'b'"
