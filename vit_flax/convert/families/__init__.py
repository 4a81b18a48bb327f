"""The families of checkpoints, and how a file is recognised."""

import re
from dataclasses import replace

from vit_flax.convert.families.google import BIG_VISION, GOOGLE
from vit_flax.convert.families.huggingface_clip import HF_CLIP, HF_SIGLIP
from vit_flax.convert.families.huggingface_dinov3 import HF_DINOV3
from vit_flax.convert.families.huggingface_vit import (
    HF_DEIT,
    HF_DINOV2,
    HF_DINOV2_WITH_REGISTERS,
    HF_VIT,
    HF_VIT_MAE,
)
from vit_flax.convert.families.meta import META_DEIT3, META_DINOV2, META_DINOV3, META_MAE
from vit_flax.convert.families.own import VIT_FLAX
from vit_flax.convert.families.timm import TIMM
from vit_flax.convert.source import Source
from vit_flax.convert.table import Family

FAMILIES: dict[str, Family] = {
    "google": GOOGLE,
    "big_vision": BIG_VISION,
    "timm": TIMM,
    "meta:dinov2": META_DINOV2,
    "meta:dinov3": META_DINOV3,
    "meta:mae": META_MAE,
    "meta:deit3": META_DEIT3,
    "vit_flax": VIT_FLAX,
    "hf:vit": HF_VIT,
    "hf:deit": HF_DEIT,
    "hf:vit_mae": HF_VIT_MAE,
    "hf:dinov2": HF_DINOV2,
    "hf:dinov2_with_registers": HF_DINOV2_WITH_REGISTERS,
    "hf:dinov3_vit": HF_DINOV3,
    "hf:siglip": HF_SIGLIP,
    "hf:clip": HF_CLIP,
}
# What `save_pretrained(family=...)` tries in order.
GROUPS: dict[str, tuple[str, ...]] = {
    "npz": ("google", "big_vision"),
    "hf": (
        "hf:vit",
        "hf:deit",
        "hf:dinov2",
        "hf:dinov2_with_registers",
        "hf:dinov3_vit",
        "hf:siglip",
        "hf:clip",
    ),
}

# Names that give away what is not supported, and what it is.
_OUT_OF_SCOPE = {
    r"relative_position_bias_table|rel_pos_bias": "a BEiT or Swin model, with relative position biases",
    r"conv_root/kernel|patch_embed\.backbone\.|bit\.embedder": "a hybrid: its patches come from a ResNet",
    r"^(params/)?txt/|^text_model\.": "a text tower without an image tower",
    r"^embeddings\.token_embedding|^transformer\.resblocks": "a text tower without an image tower",
}


def find_family(source: Source, name: str | None) -> tuple[Family, Source]:
    """The family of a file, and the file with its names spelled as in the family's table.

    Args:
      source: as opened.
      name: a key of `FAMILIES`; None to find it. What follows a colon ("timm:vit_base_patch16_224") is the architecture
        that config.json would have said.

    Raises: ValueError: unknown name, a file of no family or of several, or a file that is not of the family named.
    """
    if name is not None and name not in FAMILIES and name.partition(":")[0] in FAMILIES:
        name, _, architecture = name.partition(":")
        source = replace(source, config={**source.config, "architecture": architecture})
    if name is not None and name not in FAMILIES:
        raise ValueError(f"Unknown family {name!r}: expected one of {', '.join(FAMILIES)}.")
    spelled = {n: replace(source, tensors=family.spell(source.tensors)) for n, family in FAMILIES.items()}
    found = [n for n, family in FAMILIES.items() if family.matches(spelled[n])]
    if not found:
        _check_wrappers(source)
    if name is None:
        if len(found) != 1:
            raise _unclear(source, found)
        name = found[0]
    elif name not in found:
        also = f" It looks like {', '.join(found)}." if found else ""
        raise ValueError(f"{source.path} does not look like family={name!r} ({FAMILIES[name].about}).{also}")
    kept = {tensor.key for tensor in spelled[name].tensors.values()}
    # DINOv3's masks are part of the biases from here on.
    if lost := [key for key in source.tensors if key not in kept and not key.endswith(".bias_mask")]:
        raise ValueError(
            f"{source.path}: {lost[0]!r} and {len(lost) - 1} more have the same names in {name} as other tensors of "
            "the file, which seems to hold two models. Save one of them by itself."
        )
    return FAMILIES[name], spelled[name]


# What training puts in front of every name: DataParallel, torch.compile, the attribute of a wrapper, a moving average.
_WRAPPERS = re.compile(r"^((module|_orig_mod|model|net|backbone|student|teacher|ema|ema_model|model_ema)\.)+")


def _check_wrappers(source: Source) -> None:
    """Raises a ValueError where some family would know the names without a prefix that training left in front."""
    known: dict[str, int] = {}
    for prefix in sorted({m[0] for m in map(_WRAPPERS.match, source.tensors) if m}):
        inner = {n.removeprefix(prefix): tensor for n, tensor in source.tensors.items() if n.startswith(prefix)}
        if any(f.matches(replace(source, tensors=f.spell(inner))) for f in FAMILIES.values()):
            known[prefix] = len(inner)
    if known:
        prefix = max(known, key=lambda prefix: known[prefix])
        file = source.path if source.path.endswith(".safetensors") else "model.safetensors"
        raise ValueError(
            f"{source.path}: of its {len(source.tensors)} names, "
            + " and ".join(f"{number} begin with {prefix!r}" for prefix, number in known.items())
            + ", as the model was wrapped in training (module: DataParallel, _orig_mod: torch.compile, model: another "
            "class, ema: a moving average). Save it again without that:\n"
            f'  python -c "from safetensors.numpy import load_file, save_file; w = load_file({file!r}); save_file('
            f"{{k.removeprefix({prefix!r}): v for k, v in w.items() if k.startswith({prefix!r})}}, "
            "'unwrapped.safetensors')\""
        )


def _unclear(source: Source, found: list[str]) -> ValueError:
    if found:
        return ValueError(f"{source.path} could be any of {', '.join(found)}: say which with family=...")
    for pattern, what in _OUT_OF_SCOPE.items():
        if key := next((key for key in source.tensors if re.search(pattern, key)), None):
            return ValueError(f"{source.path} looks like {what} ({key!r}).")
    keys, said = list(source.tensors)[:5], source.config.get("model_type")
    said = f", and config.json says model_type={said!r}" if said else ""
    return ValueError(
        f"{source.path} is of no known family: its {len(source.tensors)} tensors begin with {keys}{said}. Known are "
        + "; ".join(f"{family.name} ({family.about})" for family in FAMILIES.values())
    )
