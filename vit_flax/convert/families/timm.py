"""timm's Vision Transformers: a folder with config.json and model.safetensors, or a bare file and its architecture.

In: everything out of timm's vision_transformer.py, deit.py and eva.py that this model can compute, as far as
`timm_architectures.py` knows it. Out: `timm_out.py`. The tensors of both: `timm_table.py`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from vit_flax.convert.families import timm_table
from vit_flax.convert.families.timm_architectures import ACTIVATIONS, POOLS, ROPES, facts_of
from vit_flax.convert.families.timm_out import config
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import CONFIG, Source
from vit_flax.convert.table import Family, Spec
from vit_flax.models import ViT
from vit_flax.models.patches import both_sides

# Arguments that are fields of ours; those with the same meaning in vision_transformer.py and eva.py have two names.
_ARGUMENTS = dict(
    num_classes="num_classes", embed_dim="width", depth="depth", num_heads="num_heads", patch_size="patch_size",
    class_token="class_token", reg_tokens="registers", num_reg_tokens="registers", qk_norm="qk_norm",
    pre_norm="pre_norm", use_pre_transformer_norm="pre_norm", fc_norm="norm_after_pool", use_fc_norm="norm_after_pool",
    scale_mlp="mlp_norm", scale_mlp_norm="mlp_norm",
)  # fmt: skip
# Arguments that the tensors show, that matter in training only, or that are read elsewhere here.
_SILENT = re.compile(
    r"img_size|in_chans|mlp_ratio|qkv_bias|qkv_fused|attn_type|swiglu_.*|init_values|pos_embed|"
    r"use_abs_pos_emb|use_post_transformer_norm|final_norm|dynamic_.*|strict_img_size|weight_init|fix_init|"
    r"head_init_scale|.*drop.*|rope_(shift|jitter|rescale)_coords"
)


def _describe(source: Source) -> Spec:
    if "architecture" not in source.config:
        raise ValueError(
            f"{source.path}: a bare file of timm's weights does not say which architecture it is, and the number of "
            "heads, the activation and the pooling depend on it. Name it: family='timm:vit_base_patch16_224'."
        )
    facts = facts_of(source.config["architecture"])
    arguments, card = _configuration(source.config)
    seen = timm_table.fields_of_tensors(source)
    fields = {**seen, **facts, **_stated(source, arguments, card, facts)}
    resize = {name: fields.pop(name) for name in ("posemb_resize", "patch_resize")}
    if seen["dist_token"]:
        fields["pool"] = "tok_dist"
    model = ViT(**fields)
    if model.pool == "map" and model.num_prefix_tokens and timm_table.is_eva(model):
        raise ValueError(
            f"{source.path}: the attention pooling of timm's eva.py attends to the tokens in front of the patches too, "
            "ours only to the patches."
        )
    patch = both_sides(fields["patch_size"])
    image_size = _image_size(arguments, card, patch)
    grid = (image_size[0] // patch[0], image_size[1] // patch[1]) if image_size else None
    return Spec(
        fields=fields,
        channels=arguments["in_chans"] if "in_chans" in arguments else source.shape("patch_embed.proj.weight")[1],
        grid=timm_table.grid_of_table(source, fields, grid),
        preprocess=_preprocess(card, image_size),
        class_names=_class_names(source, card, fields["num_classes"]),
        **resize,
    )


def _configuration(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of timm's constructor, and the description of the weights with the newer places on top."""
    arguments = dict(config["model_args"]) if config.get("model_args") else {}
    card = dict(config.get("pretrained_cfg", config))  # files of 2022 have one level
    card |= {key: config[key] for key in ("num_classes", "label_names") if key in config}
    return arguments, card


def _stated(source: Source, arguments: dict[str, Any], card: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ViT` that the configuration says.

    Raises: ValueError: an argument that has no counterpart here.
    """
    fields = {"num_classes": card["num_classes"]} if "num_classes" in card else {}
    rope = dict(ROPES[facts["rope"]])
    for name, value in arguments.items():
        if name == "no_embed_class" and value is not None:
            fields["class_token_position"] = not value
        elif name in _ARGUMENTS and value is not None:
            fields[_ARGUMENTS[name]] = tuple(value) if isinstance(value, list) else value
        elif name == "global_pool" and value in POOLS:
            fields["pool"] = POOLS[value]
        elif name == "act_layer" and value in ACTIVATIONS:
            fields["activation"] = ACTIVATIONS[value]
        elif name == "norm_layer" and value == "layernorm":
            fields["norm_eps"] = 1e-6
        elif any(name in known for known in ROPES.values()):
            rope[name] = list(value) if isinstance(value, list | tuple) else value
        elif value is not None and value is not False and name not in _ARGUMENTS and not _SILENT.fullmatch(name):
            raise ValueError(f"{source.path}: {CONFIG} has model_args.{name}={value!r}, which has no counterpart here.")
    fields["rope"] = _rope(source, rope)
    if "num_classes" in fields:
        fields["num_classes"] = fields["num_classes"] or None  # 0 is timm's "no head"
    if isinstance(patch := fields.get("patch_size"), tuple) and patch[0] == patch[1]:
        fields["patch_size"] = patch[0]
    return fields


def _rope(source: Source, arguments: dict[str, Any]) -> str | None:
    if not arguments["use_rot_pos_emb"]:
        return None
    for name, known in ROPES.items():
        if arguments == known:
            return name
    raise ValueError(f"{source.path}: {CONFIG} describes rotations of a kind that we do not have: {arguments}.")


def _image_size(arguments: dict[str, Any], card: dict[str, Any], patch: Grid) -> Grid | None:
    """Without the pixels of a last patch that does not fit: the convolution passes over them."""
    if "img_size" not in arguments and "input_size" not in card:
        return None
    rows, columns = both_sides(arguments["img_size"] if arguments.get("img_size") else card["input_size"][1:])
    return rows // patch[0] * patch[0], columns // patch[1] * patch[1]


def _preprocess(card: dict[str, Any], image_size: Grid | None) -> Preprocess | None:
    """None where timm's evaluation does what `Preprocess` cannot say, such as borders around the picture."""
    needed = ("mean", "std", "crop_pct", "interpolation")
    if image_size is None or not all(key in card for key in needed):
        return None
    mode = card.get("crop_mode") or "center"
    if card["interpolation"] not in _FILTERS or mode not in ("center", "squash"):
        return None
    stretch = mode == "squash" and card["crop_pct"] == 1
    return Preprocess(
        image_size=image_size,
        mean=tuple(card["mean"]),
        std=tuple(card["std"]),
        # timm rounds the resized side down: 248 for 224 and 0.9.
        crop_fraction=None if stretch else image_size[0] / math.floor(image_size[0] / card["crop_pct"]),
        keep_aspect=mode == "center" or stretch,
        filter=card["interpolation"],
    )


_FILTERS = ("bilinear", "bicubic")


def _class_names(source: Source, card: dict[str, Any], num_classes: int | None) -> tuple[str, ...] | None:
    names = card.get("label_names")
    if not names or num_classes is None:
        return None
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if len(names) != num_classes:
        raise ValueError(f"{source.path}: {CONFIG} has {len(names)} label_names for num_classes={num_classes}.")
    return tuple(names)


def _token_positions(model: ViT) -> bool | None:
    """Whether the class token must have a slot: with a distillation token it must, with registers it must not."""
    return True if model.dist_token else False if model.registers else None


def _matches(source: Source) -> bool:
    there = "patch_embed.proj.weight" in source.tensors and timm_table.FIRST + "norm1.weight" in source.tensors
    return there and ("architecture" in source.config or timm_table.is_bare(source))


TIMM = Family(
    name="timm",
    about="timm: vision_transformer, deit and eva; a folder with config.json, or 'timm:ARCHITECTURE' and a bare file",
    matches=_matches,
    describe=_describe,
    rows=timm_table.rows,
    config=config,
    token_positions=_token_positions,
)
