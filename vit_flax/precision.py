"""Float32 or better, whatever the dtype of the parameters: for what is summed, and for what moves in small steps."""

import jax
import jax.numpy as jnp
import optax

from vit_flax.typing import Array, PyTree


def wide(tree: PyTree) -> PyTree:
    """The same numbers in float32, or in their own dtype where it has more digits."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def norm(tree: PyTree) -> Array:
    """The global norm; in float16 the sum of the squares would be above its largest number, 65,504, soon."""
    return optax.tree.norm(wide(tree))
