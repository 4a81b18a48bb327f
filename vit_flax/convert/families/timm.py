"""timm's Vision Transformers: a folder with config.json and model.safetensors, or a bare file and an architecture's name.

In: everything out of timm's vision_transformer.py, deit.py and eva.py that this model can compute
(`timm_architectures.py`). Out: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens; what timm
fixes in its Python code is chosen by the architecture's name, and everything else is written into `model_args`.

Meta's original files have the same tables with some names spelled otherwise (`meta.py`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vit_flax.convert.families.timm_architectures import facts_of
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import CONFIG, Source, Tensor
from vit_flax.convert.table import (
    FLAT,
    LINEAR_FROM_HEADS,
    SAME,
    Family,
    Outgoing,
    Row,
    Spec,
    convolution,
    fused,
    linear,
    norm,
    positions,
)
from vit_flax.models import ViT

_BLOCK = "blocks.{i}."
_FIRST = "blocks.0."


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


def _is_eva(model: ViT) -> bool:
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
        *(apart + together if model.mlp_norm and _is_eva(model) else together + apart),
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
    return [*(split + packed if _is_split(model) else packed + split), *rest]


def _is_split(model: ViT) -> bool:
    """Whether timm's gated layer has one matrix for the gate and one for the values."""
    return _is_eva(model) and (model.mlp_norm or model.rope != "eva")


def _layer_scale(model: ViT) -> list[Row]:
    names = ("gamma_{n}", "ls{n}.gamma") if _is_eva(model) else ("ls{n}.gamma", "gamma_{n}")
    return [
        Row(f"blocks/layer_scale{n}/scale", _BLOCK + name.replace("{n}", str(n)), SAME)
        for name in names
        for n in (1, 2)
    ]


def fields_of_tensors(source: Source) -> dict[str, Any]:
    """The fields of `ViT` that names and shapes show; how many heads there are is not among them."""
    has = source.tensors.__contains__
    width, _, ph, pw = source.shape("patch_embed.proj.weight")
    hidden = source.shape(_FIRST + "mlp.fc2.weight")[1]
    split = has(_FIRST + "mlp.fc1_g.weight")
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
        mlp="swiglu" if split or source.shape(_FIRST + "mlp.fc1.weight")[0] == 2 * hidden else "mlp",
        mlp_norm=has(_FIRST + "mlp.norm.weight"),
        qk_norm=has(_FIRST + "attn.q_norm.weight"),
        qkv_bias=_qkv_bias(source),
        patch_bias=has("patch_embed.proj.bias"),
        layer_scale=1e-5 if has(_FIRST + "ls1.gamma") or has(_FIRST + "gamma_1") else None,
    )


def _qkv_bias(source: Source) -> str:
    names = {"qkv": ("qkv.bias", "k_proj.bias"), "qv": ("q_bias", "q_proj.bias")}
    found = (which for which, ends in names.items() if any(_FIRST + "attn." + end in source.tensors for end in ends))
    return next(found, "")


def grid_of_table(source: Source, fields: Mapping[str, Any], stated: Grid | None) -> tuple[Grid | None, bool]:
    """Rows and columns of the position table, and whether the class token has a slot in front of them.

    Args:
      source: of the weights.
      fields: as found by `fields_of_tensors`.
      stated: the grid that the configuration says; None if it does not.

    Raises: ValueError: the number of positions fits neither the stated grid nor a square.
    """
    if "pos_embed" not in source.tensors:
        return None, False
    number = source.shape("pos_embed")[1]
    tokens = fields["class_token"] + fields["dist_token"]
    for slots in (0, tokens):
        if stated and math.prod(stated) == number - slots:
            return stated, bool(slots)
    for slots in (tokens, 0):
        side = math.isqrt(max(number - slots, 0))
        if side and side * side == number - slots:
            return (side, side), bool(slots)
    raise ValueError(
        f"{source.path}: 'pos_embed' has {number} positions, which with {tokens} tokens in front is no square grid"
        + (f" and not that of the image size in {CONFIG}, {stated[0]}x{stated[1]}." if stated else ".")
    )


def spell(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the positions of registers, where they have some, to the registers."""
    out = dict(tensors)
    if "reg_token" not in out or "pos_embed" not in out or len(out["pos_embed"].shape) != 3:
        return out
    table, registers = out["pos_embed"], out["reg_token"]
    number, before = table.shape[1], int("cls_token" in out)
    after = before + registers.shape[1]
    if math.isqrt(number) ** 2 == number or math.isqrt(number - after) ** 2 != number - after:
        return out

    def positions_without() -> np.ndarray:
        return np.delete(table.read(), slice(before, after), axis=1)

    out["reg_token"] = replace(registers, read=lambda: registers.read() + table.read()[:, before:after])
    out["pos_embed"] = replace(table, shape=(1, number - after + before, table.shape[2]), read=positions_without)
    return out


# timm's arguments for the rotations that we have.
_ROPES: dict[str | None, dict[str, Any]] = {
    None: dict(use_rot_pos_emb=False),
    "dinov3": dict(
        use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100.0, rope_rotate_half=True,
        rope_grid_indexing="ij", rope_grid_offset=0.0, ref_feat_shape=None,
    ),
    "eva": dict(
        use_rot_pos_emb=True, rope_type="cat", rope_temperature=10000.0, rope_rotate_half=False,
        rope_grid_indexing="ij", rope_grid_offset=0.0, ref_feat_shape=[16, 16],
    ),
}  # fmt: skip
_POOLS = {"token": "tok", "avg": "gap", "map": "map", "": "none"}
_ACTIVATIONS = {name: name for name in ("gelu", "gelu_tanh", "quick_gelu", "silu")}
# Arguments that are fields of ours; those with the same meaning in vision_transformer.py and eva.py have two names.
_ARGUMENTS = dict(
    num_classes="num_classes", embed_dim="width", depth="depth", num_heads="num_heads", patch_size="patch_size",
    class_token="class_token", reg_tokens="registers", num_reg_tokens="registers", qk_norm="qk_norm",
    pre_norm="pre_norm", use_pre_transformer_norm="pre_norm", fc_norm="norm_after_pool", use_fc_norm="norm_after_pool",
    scale_mlp="mlp_norm", scale_mlp_norm="mlp_norm",
)  # fmt: skip
# Arguments that the tensors show, that matter in training only, or that are read elsewhere here.
_SILENT = re.compile(
    r"img_size|in_chans|mlp_ratio|qkv_bias|qkv_fused|attn_type|swiglu_.*|init_values|no_embed_class|pos_embed|"
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
    seen = fields_of_tensors(source)
    fields = {**seen, **facts, **_stated(source, arguments, card, facts)}
    resize = {name: fields.pop(name) for name in ("posemb_resize", "patch_resize")}
    if seen["dist_token"]:
        fields["pool"] = "tok_dist"
    image_size = _image_size(arguments, card)
    patch = _pair(fields["patch_size"])
    stated = (image_size[0] // patch[0], image_size[1] // patch[1]) if image_size else None
    grid, fields["class_token_position"] = grid_of_table(source, seen, stated)
    return Spec(
        fields=fields,
        channels=arguments["in_chans"] if "in_chans" in arguments else source.shape("patch_embed.proj.weight")[1],
        grid=grid,
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
    rope = dict(_ROPES[facts["rope"]])
    for name, value in arguments.items():
        if name in _ARGUMENTS and value is not None:
            fields[_ARGUMENTS[name]] = tuple(value) if isinstance(value, list) else value
        elif name == "global_pool" and value in _POOLS:
            fields["pool"] = _POOLS[value]
        elif name == "act_layer" and value in _ACTIVATIONS:
            fields["activation"] = _ACTIVATIONS[value]
        elif name == "norm_layer" and value == "layernorm":
            fields["norm_eps"] = 1e-6
        elif any(name in known for known in _ROPES.values()):
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
    for name, known in _ROPES.items():
        if arguments == known:
            return name
    raise ValueError(f"{source.path}: {CONFIG} describes rotations of a kind that we do not have: {arguments}.")


def _image_size(arguments: dict[str, Any], card: dict[str, Any]) -> Grid | None:
    if arguments.get("img_size"):
        return _pair(arguments["img_size"])
    return _pair(card["input_size"][1:]) if "input_size" in card else None


def _pair(size: Any) -> Grid:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _preprocess(card: dict[str, Any], image_size: Grid | None) -> Preprocess | None:
    """None too for what `Preprocess` cannot say: borders around the picture, and a crop out of a stretched one."""
    needed = ("mean", "std", "crop_pct", "interpolation")
    if image_size is None or not all(key in card for key in needed) or card["interpolation"] not in _FILTERS:
        return None
    stretch = card.get("crop_mode") == "squash"
    if card.get("crop_mode") not in (None, "center", "squash") or (stretch and card["crop_pct"] != 1):
        return None
    return Preprocess(
        image_size=image_size,
        mean=tuple(card["mean"]),
        std=tuple(card["std"]),
        crop_fraction=None if stretch else card["crop_pct"],
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


# The architectures that written models are instances of: what is in timm's Python code and has no place in config.json.
# (kind, epsilon) -> by width; None for any other width, which model_args says.
_EXPORTED: dict[tuple[str, float], dict[int | None, str]] = {
    ("vit", 1e-6): {
        192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 1024: "vit_large_patch16_224",
        1280: "vit_huge_patch14_224", None: "vit_base_patch16_224",
    },
    ("vit", 1e-5): {1024: "vit_large_patch14_clip_224", None: "vit_base_patch16_clip_224"},
    ("packed", 1e-6): {None: "vit_giant_patch14_dinov2"},
    ("distilled", 1e-6): {
        192: "deit_tiny_distilled_patch16_224", 384: "deit_small_distilled_patch16_224",
        None: "deit_base_distilled_patch16_224",
    },
    ("eva", 1e-6): {
        192: "eva02_tiny_patch14_224", 384: "eva02_small_patch14_224", 1024: "eva02_large_patch14_224",
        None: "eva02_base_patch14_224",
    },
    ("eva", 1e-5): {
        384: "vit_small_patch16_dinov3", 1024: "vit_large_patch16_dinov3", None: "vit_base_patch16_dinov3",
    },
}  # fmt: skip


def _config(out: Outgoing) -> dict[str, dict[str, Any]]:
    model = out.model
    kind = (
        "distilled" if model.dist_token else "eva" if _is_eva(model) else "packed" if model.mlp == "swiglu" else "vit"
    )
    if reasons := _reasons(model, kind):
        raise ValueError("; ".join(reasons))
    names = _EXPORTED[kind, model.norm_eps]
    classes = model.num_classes or 0
    content = {
        "architecture": names[model.width if model.width in names else None],
        "num_classes": classes,
        "num_features": model.width,
        "model_args": _eva_arguments(out) if kind == "eva" else _vit_arguments(out, kind),
        "pretrained_cfg": {
            "input_size": [out.channels, *out.image_size],
            "fixed_input_size": True,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if model.dist_token else "head",
            **_card(out.preprocess),
        },
    }
    return {CONFIG: content | ({"label_names": list(out.class_names)} if out.class_names else {})}


def _reasons(model: ViT, kind: str) -> list[str]:
    """Why timm has no such model."""
    epsilons = [eps for k, eps in _EXPORTED if k == kind]
    checks = {
        f"timm has no pooling {model.pool!r}": model.pool not in (*_POOLS.values(), "tok_dist"),
        f"norm_eps={model.norm_eps:g}, and timm has {' and '.join(f'{e:g}' for e in epsilons)} for such models; "
        f"model.clone(norm_eps={epsilons[0]:g}) accepts the difference": model.norm_eps not in epsilons,
        "timm's models with a distillation token average two heads on a learned table, normalise before the pooling, "
        "and have neither registers nor gated layers": kind == "distilled"
        and (
            model.pool != "tok_dist"
            or model.posemb != "learned"
            or model.norm_after_pool
            or model.mlp != "mlp"
            or model.registers > 0
        ),
        "timm's patch embedding has a bias exactly where no norm follows it": model.patch_bias == model.pre_norm,
        f"timm has no such biases, qkv_bias={model.qkv_bias!r}": model.qkv_bias not in ("", "qv", "qkv"),
        f"timm's activation would be {_eva_activation(model)!r}": kind == "eva"
        and model.activation != _eva_activation(model),
        "timm's attention pooling has an MLP of its own kind": model.pool == "map"
        and (kind == "packed" or (kind == "eva" and model.mlp == "swiglu")),
        f"timm has no rotations {model.rope!r}": model.rope not in _ROPES,
        f"posemb={model.posemb!r}: timm has learned tables only": model.posemb not in ("learned", "none"),
        "timm's heads are as wide as the model together": (model.head_dim or model.width // model.num_heads)
        * model.num_heads
        != model.width,
    }
    return [reason for reason, holds in checks.items() if holds]


def _eva_activation(model: ViT) -> str:
    return "silu" if model.mlp == "swiglu" else "gelu"


def _arguments(out: Outgoing, hidden: int) -> dict[str, Any]:
    """Those with the same name in vision_transformer.py and eva.py."""
    model = out.model
    pools = {ours: theirs for theirs, ours in _POOLS.items()} | {"tok_dist": "token"}
    return dict(
        img_size=list(out.image_size),
        patch_size=model.patch_size if isinstance(model.patch_size, int) else list(model.patch_size),
        in_chans=out.channels,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=_ratio(hidden, model.width),
        qkv_bias=bool(model.qkv_bias),
        qk_norm=model.qk_norm,
        init_values=None if model.layer_scale is None else 1e-5,
        class_token=model.has_class_token,
        no_embed_class=not (model.class_token_position and model.has_class_token),
        global_pool=pools[model.pool],
    )


def _vit_arguments(out: Outgoing, kind: str) -> dict[str, Any]:
    model = out.model
    return _arguments(out, model.mlp_dim * (2 if kind == "packed" else 1)) | dict(
        act_layer=model.activation,
        reg_tokens=model.registers,
        pre_norm=model.pre_norm,
        fc_norm=model.norm_after_pool,
        scale_mlp_norm=model.mlp_norm,
        pos_embed="learn" if model.posemb == "learned" else "none",
    )


def _eva_arguments(out: Outgoing) -> dict[str, Any]:
    model = out.model
    return _arguments(out, model.mlp_dim) | dict(
        num_reg_tokens=model.registers,
        use_pre_transformer_norm=model.pre_norm,
        use_post_transformer_norm=not model.norm_after_pool,
        use_fc_norm=model.norm_after_pool,
        scale_mlp=model.mlp_norm,
        swiglu_mlp=model.mlp == "swiglu",
        swiglu_align_to=int(_is_split(model)),
        qkv_fused=not model.mlp_norm,
        attn_type="rope" if model.qkv_bias == "qkv" else "eva",
        use_abs_pos_emb=model.posemb == "learned",
        **_ROPES[model.rope],
    )


def _ratio(hidden: int, width: int) -> float:
    """A number that timm multiplies by the width and rounds down to the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _card(preprocess: Preprocess | None) -> dict[str, Any]:
    """Timm always antialiases, so that a `Preprocess` without it changes here, as it does for timm's own copies."""
    if preprocess is None:
        return {}
    return dict(
        mean=list(preprocess.mean),
        std=list(preprocess.std),
        crop_pct=preprocess.crop_fraction or 1.0,
        crop_mode="squash" if preprocess.crop_fraction is None else "center",
        interpolation=preprocess.filter,
    )


def _token_positions(model: ViT) -> bool | None:
    """Whether the class token must have a slot: with a distillation token it must, with registers it must not."""
    return True if model.dist_token else False if model.registers else None


def is_bare(source: Source) -> bool:
    """Whether the tensors could be those of a timm model and nothing says of which."""
    meta = ("mask_token", "storage_tokens", "register_tokens", "decoder_embed.weight")
    deit3 = "pos_embed" in source.tensors and _FIRST + "gamma_1" in source.tensors
    return "architecture" not in source.config and not deit3 and not any(name in source.tensors for name in meta)


def _matches(source: Source) -> bool:
    there = "patch_embed.proj.weight" in source.tensors and _FIRST + "norm1.weight" in source.tensors
    return there and ("architecture" in source.config or is_bare(source))


TIMM = Family(
    name="timm",
    about="timm: vision_transformer, deit and eva; a folder with config.json, or 'timm:ARCHITECTURE' and a bare file",
    matches=_matches,
    describe=_describe,
    rows=rows,
    spell=spell,
    config=_config,
    token_positions=_token_positions,
)
