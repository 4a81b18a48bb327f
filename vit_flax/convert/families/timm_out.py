"""config.json of a written model, such that `timm.create_model("local-dir:FOLDER", pretrained=True)` computes the same.

What timm fixes in its Python code is chosen by the architecture's name; everything else is written into `model_args`,
so that the name decides nothing else.
"""

import math
from typing import Any

from vit_flax.convert.families.timm_architectures import POOLS, ROPES
from vit_flax.convert.families.timm_table import is_eva, is_split
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.source import CONFIG
from vit_flax.convert.table import Outgoing
from vit_flax.models import ViT

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


def config(out: Outgoing) -> dict[str, dict[str, Any]]:
    """The contents of config.json, under that name.

    Raises: ValueError: timm has no such model; every reason is in the message.
    """
    model = out.model
    kind = "distilled" if model.dist_token else "eva" if is_eva(model) else "packed" if model.mlp == "swiglu" else "vit"
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
        f"timm has no pooling {model.pool!r}": model.pool not in (*POOLS.values(), "tok_dist"),
        f"norm_eps={model.norm_eps:g}, and timm has {' or '.join(f'{e:g}' for e in epsilons)} for such models": (
            model.norm_eps not in epsilons
        ),
        "timm's models with a distillation token average two heads on a learned table, normalise before the pooling, "
        "and have neither registers, rotations, gated layers nor biases of two projections": kind == "distilled"
        and (
            model.num_classes is None
            or model.pool != "tok_dist"
            or model.posemb != "learned"
            or model.norm_after_pool
            or model.mlp != "mlp"
            or is_eva(model)
            or model.registers > 0
        ),
        "timm's patch embedding has a bias exactly where no norm follows it": model.patch_bias == model.pre_norm,
        f"timm has no such biases, qkv_bias={model.qkv_bias!r}": model.qkv_bias not in ("", "qv", "qkv"),
        f"timm's activation would be {_eva_activation(model)!r}": kind == "eva"
        and model.activation != _eva_activation(model),
        "timm's attention pooling of such models attends to the tokens in front of the patches too": kind == "eva"
        and model.pool == "map"
        and model.num_prefix_tokens > 0,
        "timm's attention pooling has an MLP of its own kind": model.pool == "map"
        and (kind == "packed" or (kind == "eva" and model.mlp == "swiglu")),
        f"timm has no rotations {model.rope!r}; model.clone(rope='dinov3') accepts the difference": model.rope
        not in ROPES,
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
    pools = {ours: theirs for theirs, ours in POOLS.items()} | {"tok_dist": "token"}
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
        swiglu_align_to=int(is_split(model)),
        qkv_fused=not model.mlp_norm,
        attn_type="rope" if model.qkv_bias == "qkv" else "eva",
        use_abs_pos_emb=model.posemb == "learned",
        **ROPES[model.rope],
    )


def _ratio(hidden: int, width: int) -> float:
    """A number that timm multiplies by the width and rounds down to the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _card(preprocess: Preprocess | None) -> dict[str, Any]:
    """What timm's transforms read. They always antialias: `antialias=False` gets lost, as in timm's own copies."""
    if preprocess is None:
        return {}
    side = preprocess.image_size[0]
    fraction = preprocess.crop_fraction
    stretch = fraction is None or not preprocess.keep_aspect
    return dict(
        mean=list(preprocess.mean),
        std=list(preprocess.std),
        crop_pct=1.0 if fraction is None else _crop_pct(side, round(side / fraction)),
        crop_mode="squash" if stretch else "center",
        interpolation=preprocess.filter,
    )


def _crop_pct(side: int, resized: int) -> float:
    """The shortest number of those by which timm, which rounds down, resizes to `resized`."""
    numbers = (math.floor(side / resized * 10**digits) / 10**digits for digits in range(1, 16))
    return next(
        (number for number in numbers if number and math.floor(side / number) == resized), side / (resized + 0.5)
    )
