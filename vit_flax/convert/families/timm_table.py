"""The table of timm's tensors, and what their names and shapes show; Meta's files have it too, with some other names.

timm has several spellings of some layers: vision_transformer.py fuses the projections with their biases, eva.py leaves
the keys without one, keeps the biases apart or does not fuse at all, and gated layers are packed or split.
"""

import math
from collections.abc import Mapping
from typing import Any

from vit_flax.convert.resample import Grid
from vit_flax.convert.source import CONFIG, Source
from vit_flax.convert.table import (
    FLAT,
    LINEAR_FROM_HEADS,
    SAME,
    Row,
    convolution,
    fused,
    linear,
    norm,
    positions,
)
from vit_flax.models import ViT

_BLOCK = "blocks.{i}."
FIRST = "blocks.0."


def rows(model: ViT) -> list[Row]:
    """The table; timm has several spellings of some layers, and the one of the model's own kind comes first."""
    return [
        Row("cls_token/token", "cls_token", SAME),
        Row("dist_token/token", "dist_token", SAME),
        Row("registers/tokens", "reg_token", SAME),
        *positions(model, "pos_embed"),
        Row("patch_embed/kernel", "patch_embed.proj.weight", convolution(model.patch_size)),
        Row("patch_embed/bias", "patch_embed.proj.bias", SAME),
        *norm("pre_norm", "norm_pre"),
        *norm("blocks/norm1", _BLOCK + "norm1"),
        *norm("blocks/norm2", _BLOCK + "norm2"),
        *_attention(model),
        *_mlp(model),
        *_layer_scale(model),
        *norm("norm", "fc_norm" if model.norm_after_pool else "norm"),
        Row("pool/probe", "attn_pool.latent", SAME),
        *linear("pool/attention/query", "attn_pool.q"),
        *fused("pool/attention", "attn_pool.kv", ("key", "value")),
        *linear("pool/attention/out", "attn_pool.proj", LINEAR_FROM_HEADS),
        *norm("pool/norm", "attn_pool.norm"),
        *linear("pool/mlp/fc1", "attn_pool.mlp.fc1"),
        *linear("pool/mlp/fc2", "attn_pool.mlp.fc2"),
        *linear("head", "head"),
        *linear("head_dist", "head_dist"),
    ]


def is_eva(model: ViT) -> bool:
    """Whether the model is one of timm's eva.py: rotations, or no bias for the keys."""
    return model.rope is not None or model.qkv_bias == "qv"


def _attention(model: ViT) -> list[Row]:
    ours, theirs = "blocks/attention", _BLOCK + "attn"
    together = fused(ours, theirs + ".qkv", ("query", "key", "value"))
    apart = [r for name in ("query", "key", "value") for r in linear(f"{ours}/{name}", f"{theirs}.{name[0]}_proj")]
    if model.qkv_bias == "qv":  # eva.py adds the two biases outside the fused layer
        biases = [Row(f"{ours}/{name}/bias", f"{theirs}.{name[0]}_bias", FLAT) for name in ("query", "value")]
        together = [row for row in together if row.ours.endswith("kernel")] + biases
    return [
        *(apart + together if model.mlp_norm and is_eva(model) else together + apart),
        *norm(f"{ours}/query_norm", f"{theirs}.q_norm"),
        *norm(f"{ours}/key_norm", f"{theirs}.k_norm"),
        *linear(f"{ours}/out", f"{theirs}.proj", LINEAR_FROM_HEADS),
    ]


def _mlp(model: ViT) -> list[Row]:
    ours, theirs = "blocks/mlp", _BLOCK + "mlp"
    rest = [*norm(f"{ours}/norm", f"{theirs}.norm"), *linear(f"{ours}/fc2", f"{theirs}.fc2")]
    if model.mlp == "mlp":
        return [*linear(f"{ours}/fc1", f"{theirs}.fc1"), *rest]
    packed = fused(ours, f"{theirs}.fc1", ("gate", "fc1"))
    split = [*linear(f"{ours}/gate", f"{theirs}.fc1_g"), *linear(f"{ours}/fc1", f"{theirs}.fc1_x")]
    return [*(split + packed if is_split(model) else packed + split), *rest]


def is_split(model: ViT) -> bool:
    """Whether timm's gated layer has one matrix for the gate and one for the values."""
    return is_eva(model) and (model.mlp_norm or model.rope != "eva")


def _layer_scale(model: ViT) -> list[Row]:
    names = ("gamma_{n}", "ls{n}.gamma") if is_eva(model) else ("ls{n}.gamma", "gamma_{n}")
    return [
        Row(f"blocks/layer_scale{n}/scale", _BLOCK + name.replace("{n}", str(n)), SAME)
        for name in names
        for n in (1, 2)
    ]


def fields_of_tensors(source: Source) -> dict[str, Any]:
    """The fields of `ViT` that names and shapes show; how many heads there are is not among them."""
    has = source.tensors.__contains__
    width, _, ph, pw = source.shape("patch_embed.proj.weight")
    hidden = source.shape(FIRST + "mlp.fc2.weight")[1]
    gated = has(FIRST + "mlp.fc1_g.weight") or source.shape(FIRST + "mlp.fc1.weight")[0] == 2 * hidden
    return dict(
        num_classes=source.shape("head.weight")[0] if has("head.weight") else None,
        patch_size=ph if ph == pw else (ph, pw),
        width=width,
        depth=source.depth(_BLOCK),
        mlp_dim=hidden,
        posemb="learned" if has("pos_embed") else "none",
        class_token=has("cls_token"),
        dist_token=has("dist_token"),
        registers=source.shape("reg_token")[1] if has("reg_token") else 0,
        pre_norm=has("norm_pre.weight"),
        norm_after_pool=has("fc_norm.weight"),
        mlp="swiglu" if gated else "mlp",
        activation="silu" if gated else "gelu",  # unless the architecture or its configuration says another
        mlp_norm=has(FIRST + "mlp.norm.weight"),
        qk_norm=has(FIRST + "attn.q_norm.weight"),
        qkv_bias=_qkv_bias(source),
        patch_bias=has("patch_embed.proj.bias"),
        layer_scale=1e-5 if has(FIRST + "ls1.gamma") or has(FIRST + "gamma_1") else None,
    )


def _qkv_bias(source: Source) -> str:
    names = {"qkv": ("qkv.bias", "k_proj.bias"), "qv": ("q_bias", "q_proj.bias")}
    found = (which for which, ends in names.items() if any(FIRST + "attn." + end in source.tensors for end in ends))
    return next(found, "")


def grid_of_table(source: Source, fields: Mapping[str, Any], stated: Grid | None) -> Grid | None:
    """Rows and columns of the position table; None if there is no table.

    Args:
      source: of the weights.
      fields: of `ViT`; they say whether the tokens have slots in front of the grid.
      stated: the grid that the configuration says; None if it does not, for a square.

    Raises: ValueError: the number of positions is another one.
    """
    if "pos_embed" not in source.tensors:
        return None
    number = source.shape("pos_embed")[1]
    tokens = (fields["class_token"] + fields["dist_token"]) if fields["class_token_position"] else 0
    side = math.isqrt(max(number - tokens, 0))
    grid = stated or (side, side)
    if math.prod(grid) != number - tokens:
        wanted = f"the grid of {stated[0]}x{stated[1]} that {CONFIG} says" if stated else "a square grid"
        raise ValueError(
            f"{source.path}: 'pos_embed' has {number} positions, {tokens} of them for tokens, which does not leave "
            f"{wanted}. The configuration is not of these weights, or the wrong family or architecture was named."
        )
    return grid


def is_bare(source: Source) -> bool:
    """Whether the tensors could be those of a timm model and nothing says of which."""
    meta = ("mask_token", "storage_tokens", "register_tokens", "decoder_embed.weight")
    deit3 = "pos_embed" in source.tensors and FIRST + "gamma_1" in source.tensors
    return "architecture" not in source.config and not deit3 and not any(name in source.tensors for name in meta)
