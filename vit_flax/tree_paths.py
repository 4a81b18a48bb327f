"""Paths of the leaves of a tree as text, such as "params/head/kernel": rules, checksums and messages go by them."""

from typing import Any

import jax

from vit_flax.typing import PyTree


def name_of(path: tuple[Any, ...]) -> str:
    """A path as JAX gives it, as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """Path of each leaf -> the leaf."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
