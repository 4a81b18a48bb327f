"""DINOv3's ViT as transformers writes and reads it: positions are rotations, and no class has a head.

The first layer of the feed-forward part is called up_proj with a gate beside it and without one.
"""

from typing import Any

import numpy as np

from vit_flax.convert.families.huggingface import (
    read_config,
    read_fields,
    read_preprocess,
    recognise,
    write_fields,
    write_files,
)
from vit_flax.convert.source import CONFIG, Source
from vit_flax.convert.table import (
    LINEAR_FROM_HEADS,
    SAME,
    Family,
    Outgoing,
    Row,
    Spec,
    convolution,
    linear,
    norm,
    renaming,
)
from vit_flax.models import ViT

# The defaults of DINOv3ViTConfig (transformers 5.24).
_DEFAULTS = dict(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=16,
    num_channels=3, hidden_act="gelu", layer_norm_eps=1e-5, rope_theta=100.0, query_bias=True, key_bias=False,
    value_bias=True, proj_bias=True, mlp_bias=True, layerscale_value=1.0, use_gated_mlp=False, num_register_tokens=0,
)  # fmt: skip
_BLOCK = "layer.{i}."


def _rows(model: ViT) -> list[Row]:
    names = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    return [
        Row("cls_token/token", "embeddings.cls_token", SAME),
        Row("registers/tokens", "embeddings.register_tokens", SAME),
        Row("patch_embed/kernel", "embeddings.patch_embeddings.weight", convolution(model.patch_size)),
        Row("patch_embed/bias", "embeddings.patch_embeddings.bias", SAME),
        *norm("blocks/norm1", f"{_BLOCK}norm1"),
        *[row for ours, theirs in names for row in linear(f"blocks/attention/{ours}", f"{_BLOCK}attention.{theirs}")],
        *linear("blocks/attention/out", f"{_BLOCK}attention.o_proj", LINEAR_FROM_HEADS),
        Row("blocks/layer_scale1/scale", f"{_BLOCK}layer_scale1.lambda1", SAME),
        *norm("blocks/norm2", f"{_BLOCK}norm2"),
        *linear("blocks/mlp/gate", f"{_BLOCK}mlp.gate_proj"),
        *linear("blocks/mlp/fc1", f"{_BLOCK}mlp.up_proj"),
        *linear("blocks/mlp/fc2", f"{_BLOCK}mlp.down_proj"),
        Row("blocks/layer_scale2/scale", f"{_BLOCK}layer_scale2.lambda1", SAME),
        *norm("norm", "norm"),
    ]


def _describe(source: Source) -> Spec:
    config = read_config(source, _DEFAULTS)
    if config["rope_theta"] != 100:
        raise ValueError(f"{source.path}: rope_theta={config['rope_theta']} in {CONFIG}; only 100 is supported.")
    biases = [
        *(["blocks/attention/out/bias"] if not config["proj_bias"] else []),
        *([f"blocks/mlp/{n}/bias" for n in _mlp_layers(config["use_gated_mlp"])] if not config["mlp_bias"] else []),
    ]
    return Spec(
        fields=read_fields(source, config)
        | dict(
            num_classes=None,
            mlp="swiglu" if config["use_gated_mlp"] else "mlp",
            mlp_dim=config["intermediate_size"],
            posemb="none",
            rope="dinov3",
            class_token=True,
            registers=config["num_register_tokens"],
            pool="tok",
            qkv_bias="".join(name[0] for name in ("query", "key", "value") if config[f"{name}_bias"]),
            layer_scale=config["layerscale_value"],
        ),
        channels=config["num_channels"],
        posemb_resize="bicubic",  # of no table
        patch_resize="bicubic_antialias",
        preprocess=read_preprocess(source, config["patch_size"]),
        unused=(r"^embeddings\.mask_token$", *_no_registers(config["num_register_tokens"])),
        constants=dict.fromkeys(biases, 0.0),
    )


def _mlp_layers(gated: bool) -> tuple[str, ...]:
    return ("gate", "fc1", "fc2") if gated else ("fc1", "fc2")


def _no_registers(number: int) -> tuple[str, ...]:
    return () if number else (r"^embeddings\.register_tokens$",)  # an empty tensor stands in the file


def _config(out: Outgoing) -> dict[str, dict[str, Any]]:
    model = out.model
    config = dict(
        architectures=["DINOv3ViTModel"],
        model_type="dinov3_vit",
        **write_fields(out),
        intermediate_size=model.mlp_dim,
        use_gated_mlp=model.mlp == "swiglu",
        num_register_tokens=model.registers,
        layerscale_value=1.0 if model.layer_scale is None else model.layer_scale,
        **{f"{name}_bias": name[0] in model.qkv_bias for name in ("query", "key", "value")},
    )
    return write_files(out, config)


def _extra(out: Outgoing) -> dict[str, np.ndarray]:
    width = out.model.width
    empty = {} if out.model.registers else {"embeddings.register_tokens": np.zeros((1, 0, width), np.float32)}
    return {"embeddings.mask_token": np.zeros((1, 1, width), np.float32)} | empty


HF_DINOV3 = Family(
    name="hf:dinov3_vit",
    about="transformers DINOv3ViTModel, with a plain or a gated feed-forward layer",
    matches=recognise(["dinov3_vit"], present=["embeddings.patch_embeddings.weight", "layer.0.mlp.up_proj.weight"]),
    describe=_describe,
    rows=_rows,
    spell=renaming((r"^model\.layer\.", "layer.")),
    config=_config,
    extra=_extra,
)
