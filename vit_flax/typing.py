"""Array types for signatures: jaxtyping where it is installed, harmless stand-ins where it is not.

The benchmark must run on machines that carry only jax, flax, optax, numpy and absl-py; everywhere else jaxtyping is a
dependency. The tests switch on run-time checking of these annotations (`tests/conftest.py`).

Axis letters used throughout the package:
  b batch · h w c image · p patch · n tokens · d width · f mlp_dim · k heads · e head dim · l depth · v classes
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, Shaped, UInt8
else:
    try:
        from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, Shaped, UInt8
    except ModuleNotFoundError:
        from typing import Any

        class _Unchecked:
            def __class_getitem__(cls, _):
                return Any

        Array = ArrayLike = PyTree = Any
        Bool = Float = Int = Key = Shaped = UInt8 = _Unchecked

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Int", "Key", "PyTree", "Shaped", "UInt8"]
