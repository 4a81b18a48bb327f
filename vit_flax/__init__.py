"""Vision Transformers in JAX and Flax: train, fine-tune, convert and look inside, without TensorFlow."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_flax.convert import Pretrained, load_pretrained, save_pretrained
    from vit_flax.job import build
    from vit_flax.models import ViT
    from vit_flax.trainer import evaluate, train

# Public name -> the module that has it. Imported when first used, so that `import vit_flax` costs nothing.
_PUBLIC = {
    "Pretrained": "vit_flax.convert",
    "ViT": "vit_flax.models",
    "build": "vit_flax.job",
    "evaluate": "vit_flax.trainer",
    "load_pretrained": "vit_flax.convert",
    "save_pretrained": "vit_flax.convert",
    "train": "vit_flax.trainer",
}

__all__ = ["Pretrained", "ViT", "build", "evaluate", "load_pretrained", "save_pretrained", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vit_flax' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value
