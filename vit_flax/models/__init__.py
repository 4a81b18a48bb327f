"""The model. `make_model` takes the `model` section of a config."""

from typing import Any

from vit_flax.models.variants import SIZES, parse
from vit_flax.models.vit import ViT

__all__ = ["SIZES", "ViT", "make_model"]


def make_model(*, variant: str | None = None, **fields: Any) -> ViT:
    """A ViT of a named size with some fields changed, or one with every size spelled out.

    Args:
      variant: such as "B/16"; None if the fields give width, depth, mlp_dim, num_heads and patch_size.
      **fields: of `ViT`.

    Raises: TypeError: a field that does not exist or is missing. ValueError: a value that makes no model; a variant of
      which the fields leave nothing.
    """
    if variant and not (sizes := parse(variant)).keys() - fields.keys():
        raise ValueError(
            f"{variant=} changes nothing, because {', '.join(sizes)} are given beside it: remove it, or some of them."
        )
    return ViT.from_variant(variant, **fields) if variant else ViT(**fields)
