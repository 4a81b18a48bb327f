"""A checksum for every leaf of a tree of arrays, and the differences between two sets of them.

Computed where the arrays are, so that it costs one pass over device memory; the values are the same on any mesh.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_flax.tree_paths import by_path
from vit_flax.typing import Array, PyTree

ABSENT = "absent"
MOST_CHARACTERS = 100  # of a value, in a message about differences


@jax.jit
def leaf_sums(tree: PyTree) -> PyTree:
    """One uint32 per leaf, computed without waiting for it.

    Any change of one word changes the sum; a larger change goes unseen once in 2^32.
    """
    return jax.tree.map(_leaf_sum, tree)


def _leaf_sum(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)  # 8-byte numbers become two words
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    # The position from iotas rather than from a flattened copy, which would gather an array that is spread out.
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finaliser of MurmurHash3 over each word and its position. Without it a weighted sum of words misses, for
    # example, 384 ones that became zeros: the weights of a whole block add up to a multiple of a high power of two.
    h = words + position * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)  # sums of integers are exact in any order


def checksums(tree: PyTree) -> dict[str, int]:
    """Path of each leaf -> its checksum."""
    return by_path(jax.tree.map(int, jax.device_get(leaf_sums(tree))))


def shapes(tree: PyTree) -> dict[str, list]:
    """Path of each leaf -> [shape, dtype], as JSON knows them."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in by_path(tree).items()}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], within: str = "") -> dict[str, tuple[Any, Any]]:
    """Key -> (value in a, value in b), where they differ; what only one of them has is "absent" in the other.

    Args:
      a: values; where both have a dict, its keys are compared, with a dot after the one that leads to it.
      b: the same.
      within: what all keys begin with.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*a, *b}):
        theirs, ours = a.get(key, ABSENT), b.get(key, ABSENT)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            found |= differences(theirs, ours, f"{within}{key}.")
        elif theirs != ours:
            found[within + key] = theirs, ours
    return found


def rows_of(diff: Mapping[str, tuple[Any, Any]], theirs: str, ours: str) -> str:
    """Differences as text, one in a line; of long values the part where they first differ.

    Args:
      diff: see `differences`.
      theirs: what to call the first value of each.
      ours: and the second.
    """
    rows = []
    for key, values in diff.items():
        a, b = (value if value == ABSENT else repr(value) for value in values)
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0)
        start = max(0, same - 20) if max(len(a), len(b)) > MOST_CHARACTERS else 0
        rows.append(f"  {key}: {theirs} {_cut(a, start)}, {ours} {_cut(b, start)}")
    return "\n".join(rows)


def _cut(text: str, start: int) -> str:
    end = start + MOST_CHARACTERS
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"
