"""The named model sizes and the one parser for names such as "B/16"."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from vit_flax.models.heads import POOLS

# name: (width, depth, mlp_dim, num_heads)
SIZES: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),  # smoke tests
    "Ti": (192, 12, 768, 3),  # Touvron et al. 2021, table 1 (arXiv:2012.12877)
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),  # Dosovitskiy et al. 2021, table 1 (arXiv:2010.11929)
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),  # Alabdulmohsin et al. 2023 (arXiv:2305.13035)
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),  # Zhai et al. 2022, table 2 (arXiv:2106.04560)
    "G": (1664, 48, 8192, 16),
}

DTYPES = ("float32", "bfloat16", "float16")  # wider ones would be float32 where sums are


def parse(variant: str) -> dict[str, int]:
    """Reads a variant name into the fields of `ViT` that it fixes.

    Args:
      variant: size and patch size in pixels, such as "S/16".

    Returns: width, depth, mlp_dim, num_heads and patch_size.

    Raises:
      ValueError: the name has another form or an unknown size; the message lists the known ones.

    >>> parse("Ti/16")
    {'width': 192, 'depth': 12, 'mlp_dim': 768, 'num_heads': 3, 'patch_size': 16}
    """
    match = re.fullmatch(r"([A-Za-z0-9]+)/(\d+)", variant)
    if not match or match[1] not in SIZES or int(match[2]) == 0:
        raise ValueError(
            f"Unknown model variant {variant!r}: expected <size>/<patch size in pixels>, such as 'B/16', "
            f"with a size out of {', '.join(SIZES)}."
        )
    sizes = dict(zip(("width", "depth", "mlp_dim", "num_heads"), SIZES[match[1]]))
    return {**sizes, "patch_size": int(match[2])}


def check_fields(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises a TypeError that names the field that does not exist and the nearest one that does."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
            raise TypeError(f"ViT has no field {name!r}.{hint}")


def check_choices(model: Any, **choices: Iterable[Any]) -> None:
    """Raises a ValueError for a field of the model that is none of its choices."""
    for name, allowed in choices.items():
        if getattr(model, name) not in [*allowed]:  # a list: the value may be anything, also unhashable
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"model.{name}={getattr(model, name)!r} is unknown: expected one of {names}.")


def check_dtypes(model: Any) -> None:
    """Raises a ValueError for a dtype that the model does not compute in."""
    for name in ("dtype", "param_dtype"):
        dtype = getattr(model, name)
        with contextlib.suppress(TypeError):  # of what NumPy does not know, such as "bf16"
            if jnp.dtype(dtype).name in DTYPES:
                continue
        raise ValueError(f"model.{name}={dtype!r}: expected one of {', '.join(DTYPES)}.")


def check_sizes(model: Any) -> None:
    """Raises a ValueError for sizes that do not make a model."""
    for name in ("width", "depth", "mlp_dim", "num_heads"):
        if getattr(model, name) < 1:
            raise ValueError(f"model.{name} must be 1 or more, got {getattr(model, name)}.")
    for name in ("num_classes", "head_dim", "representation_size", "scan_unroll"):
        if getattr(model, name) is not None and getattr(model, name) < 1:
            raise ValueError(f"model.{name} must be 1 or more, or None, got {getattr(model, name)}.")
    sides = (model.patch_size,) * 2 if isinstance(model.patch_size, int) else model.patch_size
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"model.patch_size is one side or (height, width) of 1 or more, got {model.patch_size!r}.")
    if model.registers < 0:
        raise ValueError(f"model.registers must be 0 or more, got {model.registers}.")
    if not 0 < model.norm_eps < math.inf:
        raise ValueError(f"model.norm_eps must be a positive number, got {model.norm_eps}.")
    for name in ("layer_scale", "head_bias_init"):
        if not math.isfinite(getattr(model, name) or 0.0):
            raise ValueError(f"model.{name} must be a finite number, got {getattr(model, name)}.")
    if model.head_dim is None and model.width % model.num_heads:
        raise ValueError(
            f"model.num_heads={model.num_heads} must divide model.width={model.width}, or model.head_dim must be given."
        )
    if model.rope is not None and (model.head_dim or model.width // model.num_heads) % 4:
        raise ValueError(
            f"model.rope={model.rope!r} rotates quarters of a head: its dimension must be a multiple of 4, "
            f"found {model.head_dim or model.width // model.num_heads}."
        )
    for name in ("drop_path", "dropout", "attention_dropout", "head_dropout"):
        if not 0 <= getattr(model, name) < 1:
            raise ValueError(f"model.{name} is a probability below 1, got {getattr(model, name)}.")
    if POOLS[model.pool].needs_dist_token and not model.dist_token:
        raise ValueError(f"model.pool={model.pool!r} reads the distillation token: set model.dist_token=True.")
    if POOLS[model.pool].needs_class_token and model.class_token is False:
        raise ValueError(f"model.pool={model.pool!r} reads the class token: it cannot have model.class_token=False.")
