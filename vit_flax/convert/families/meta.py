"""Meta's original files: DINOv2, DINOv3, MAE and DeiT III, saved again as safetensors (the error for a .pth says how).

The original DeiT and DINO (2021) have timm's names and its semantics: family="timm:deit_base_patch16_224" and the like.
What these files do not show, the number of heads, follows from the width of the published models; for another width it
has to be in a config.json beside the file: {"num_heads": 4}.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from vit_flax.convert.families import timm_table
from vit_flax.convert.preprocess import IMAGENET, Preprocess
from vit_flax.convert.source import CONFIG, Source, Tensor
from vit_flax.convert.table import Family, Spec, renaming

_timm_names = renaming(
    (r"^(register_tokens|storage_tokens)$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_MASK = ".attn.qkv.bias_mask"
_PERIODS = "rope_embed.periods"


def _spell(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = _timm_names(tensors)
    for mask in [name for name in out if name.endswith(_MASK)]:
        fused = mask.removesuffix("_mask")
        out |= _query_and_value_bias(out.pop(fused), out.pop(mask), fused.removesuffix("qkv.bias"))
    return out


def _query_and_value_bias(bias: Tensor, mask: Tensor, layer: str) -> dict[str, Tensor]:
    """The bias of queries and values under timm's names: DINOv3 multiplies the fused one by a mask, 0 for the keys."""
    width = bias.shape[0] // 3

    def third(i: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            keep = mask.read().reshape(3, width)
            if np.any(keep[1] != 0):
                raise ValueError("its mask leaves a bias to the keys, which DINOv3 has not")
            return bias.read().reshape(3, width)[i] * keep[i]

        return read

    return {f"{layer}{name}_bias": replace(bias, shape=(width,), read=third(i)) for name, i in (("q", 0), ("v", 2))}


def _heads(source: Source, published: Mapping[int, int]) -> int:
    if "num_heads" in source.config:
        return source.config["num_heads"]
    width = source.shape("patch_embed.proj.weight")[0]
    if width not in published:
        raise ValueError(
            f"{source.path}: the file does not show how many heads a model of width {width} has, and no published one "
            f'has this width ({", ".join(map(str, published))}). Put a {CONFIG} beside it: {{"num_heads": ...}}.'
        )
    return published[width]


def _describe(
    source: Source,
    *,
    heads: Mapping[int, int],
    preprocess: Preprocess,
    posemb_resize: str,
    fields: Mapping[str, Any],
    unused: tuple[str, ...] = (),
) -> Spec:
    fields = {**timm_table.fields_of_tensors(source), "num_heads": _heads(source, heads), **fields}
    grid, patch = timm_table.grid_of_table(source, fields, None), fields["patch_size"]
    return Spec(
        fields=fields,
        channels=source.shape("patch_embed.proj.weight")[1],
        grid=grid,
        posemb_resize=posemb_resize,
        patch_resize="bicubic_antialias",
        preprocess=preprocess.with_image_size((grid[0] * patch, grid[1] * patch)) if grid else preprocess,
        unused=unused,
    )


_CROPPED = Preprocess((224, 224), *IMAGENET, crop_fraction=224 / 256, filter="bicubic")


def _describe_dinov2(source: Source) -> Spec:
    return _describe(
        source,
        heads={384: 6, 768: 12, 1024: 16, 1536: 24},
        preprocess=_CROPPED,
        posemb_resize="bicubic_antialias" if "reg_token" in source.tensors else "bicubic_offset",
        fields=dict(class_token_position=True),
        unused=(r"^mask_token$",),
    )


def _describe_dinov3(source: Source) -> Spec:
    return _describe(
        source,
        heads={384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32},
        preprocess=Preprocess((256, 256), *IMAGENET, filter="bilinear"),
        posemb_resize="bicubic_antialias",  # there is no table
        fields=dict(class_token_position=False, norm_eps=1e-5, rope=_rope(source)),
        unused=(r"^mask_token$", rf"^{re.escape(_PERIODS)}$", r"^local_cls_norm\."),
    )


def _rope(source: Source) -> str:
    """By the stored periods: the published files hold them rounded to bfloat16, and Meta's code computes with those.

    Raises: ValueError: they are neither those of the paper nor these rounded.
    """
    if _PERIODS not in source.tensors:
        return "dinov3"
    stored = source.tensors[_PERIODS].read().astype(np.float32)
    exact = np.float32(100.0 ** (np.arange(len(stored)) / len(stored)))
    if np.allclose(stored, exact, rtol=1e-6):
        return "dinov3"
    if np.allclose(stored, exact.astype(ml_dtypes.bfloat16).astype(np.float32), rtol=0, atol=0):
        return "dinov3_bf16"
    raise ValueError(
        f"{source.path}: {_PERIODS!r} holds {stored}, and the periods of DINOv3 are {exact}. The file was trained with "
        "another base, which we do not have."
    )


def _describe_mae(source: Source) -> Spec:
    return _describe(
        source,
        heads={768: 12, 1024: 16, 1280: 16},
        preprocess=_CROPPED,
        posemb_resize="bicubic",
        fields=dict(class_token_position=True, pool="gap" if "fc_norm.weight" in source.tensors else "tok"),
        unused=(r"^mask_token$", r"^decoder_"),
    )


def _describe_deit3(source: Source) -> Spec:
    return _describe(
        source,
        heads={384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16},
        preprocess=replace(_CROPPED, crop_fraction=1.0),
        posemb_resize="bicubic",
        fields=dict(class_token_position=False),
    )


def _has(source: Source, *names: str) -> bool:
    return "architecture" not in source.config and all(
        name in source.tensors for name in ("patch_embed.proj.weight", "blocks.0.norm1.weight", "cls_token", *names)
    )


def _is_dinov2(source: Source) -> bool:
    return _has(source, "mask_token", "pos_embed", "blocks.0.ls1.gamma")


def _is_dinov3(source: Source) -> bool:
    return _has(source, "mask_token", "reg_token", "blocks.0.ls1.gamma") and "pos_embed" not in source.tensors


def _is_mae(source: Source) -> bool:
    """The pre-trained file with its decoder; without it the names are those of any timm model."""
    if "blocks.0.ls1.gamma" in source.tensors or "reg_token" in source.tensors:
        return False
    return _has(source, "pos_embed") and ("decoder_embed.weight" in source.tensors or timm_table.is_bare(source))


def _is_deit3(source: Source) -> bool:
    return _has(source, "pos_embed", "blocks.0.gamma_1")


_family = partial(Family, rows=timm_table.rows, spell=_spell)
META_DINOV2 = _family(
    name="meta:dinov2",
    about="facebookresearch/dinov2, with and without registers, also the gated giant",
    matches=_is_dinov2,
    describe=_describe_dinov2,
)
META_DINOV3 = _family(
    name="meta:dinov3",
    about="facebookresearch/dinov3, plain and gated",
    matches=_is_dinov3,
    describe=_describe_dinov3,
)
META_MAE = _family(
    name="meta:mae",
    about="facebookresearch/mae: pre-trained, with or without its decoder, or fine-tuned",
    matches=_is_mae,
    describe=_describe_mae,
)
META_DEIT3 = _family(
    name="meta:deit3",
    about="facebookresearch/deit, DeiT III",
    matches=_is_deit3,
    describe=_describe_deit3,
)
