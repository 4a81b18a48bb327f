"""ViT, DeiT, the encoder of ViTMAE, DINOv2 and DINOv2 with registers, as transformers writes and reads them.

They share one skeleton of names. The tables below have the names of files (the hub, transformers 4, and what
transformers 5 saves); `spell` brings the names of transformers 5 in memory to them, and takes off the prefix that a
model with a head puts in front of its backbone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vit_flax.convert.families.huggingface import (
    head_size,
    read_class_names,
    read_config,
    read_fields,
    read_grid,
    read_preprocess,
    read_probabilities,
    recognise,
    require_square,
    write_fields,
    write_files,
    write_labels,
)
from vit_flax.convert.source import Source
from vit_flax.convert.table import (
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
    renaming,
)
from vit_flax.models import ViT

# The defaults of the library's configuration classes (transformers 5.24).
_SIZES = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224, num_channels=3)
_VIT = dict(
    **_SIZES, patch_size=16, intermediate_size=3072, hidden_act="gelu", layer_norm_eps=1e-12, qkv_bias=True,
    pooler_act="tanh",
)  # fmt: skip
_DINOV2 = dict(
    **_SIZES, patch_size=14, mlp_ratio=4, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True, layerscale_value=1.0,
    use_swiglu_ffn=False,
)  # fmt: skip
_DINOV2_REGISTERS = _DINOV2 | dict(patch_size=16, num_register_tokens=4)

_BLOCK = "encoder.layer.{i}."
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_QKV = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))


def _table(model: ViT, prefix: str) -> list[Row]:
    """The rows of the backbone under one prefix."""
    e, b = f"{prefix}embeddings.", prefix + _BLOCK
    attention = f"{b}attention."
    return [
        Row("cls_token/token", f"{e}cls_token", SAME),
        Row("dist_token/token", f"{e}distillation_token", SAME),
        Row("registers/tokens", f"{e}register_tokens", SAME),
        *positions(model, f"{e}position_embeddings"),
        Row("patch_embed/kernel", prefix + _PATCHES, convolution(model.patch_size)),
        Row("patch_embed/bias", f"{e}patch_embeddings.projection.bias", SAME),
        *[row for name, _ in _QKV for row in linear(f"blocks/attention/{name}", f"{attention}attention.{name}")],
        *linear("blocks/attention/out", f"{attention}output.dense", LINEAR_FROM_HEADS),
        *norm("norm", f"{prefix}layernorm"),
        *linear("pre_logits", f"{prefix}pooler.dense"),
    ]


def _vit_table(model: ViT, prefix: str) -> list[Row]:
    b = prefix + _BLOCK
    return [
        *_table(model, prefix),
        *norm("blocks/norm1", f"{b}layernorm_before"),
        *norm("blocks/norm2", f"{b}layernorm_after"),
        *linear("blocks/mlp/fc1", f"{b}intermediate.dense"),
        *linear("blocks/mlp/fc2", f"{b}output.dense"),
    ]


def _dinov2_table(model: ViT, prefix: str) -> list[Row]:
    b = prefix + _BLOCK
    return [
        *_table(model, prefix),
        *norm("blocks/norm1", f"{b}norm1"),
        *norm("blocks/norm2", f"{b}norm2"),
        Row("blocks/layer_scale1/scale", f"{b}layer_scale1.lambda1", SAME),
        Row("blocks/layer_scale2/scale", f"{b}layer_scale2.lambda1", SAME),
        *(_swiglu(b) if model.mlp == "swiglu" else [
            *linear("blocks/mlp/fc1", f"{b}mlp.fc1"),
            *linear("blocks/mlp/fc2", f"{b}mlp.fc2"),
        ]),
    ]  # fmt: skip


def _swiglu(block: str) -> list[Row]:
    """Files hold the gate on top of the value in one layer; transformers 5 holds two."""
    return [
        *fused("blocks/mlp", f"{block}mlp.weights_in", ("gate", "fc1")),
        *linear("blocks/mlp/fc2", f"{block}mlp.weights_out"),
        *linear("blocks/mlp/gate", f"{block}mlp.gate_proj"),
        *linear("blocks/mlp/fc1", f"{block}mlp.up_proj"),
        *linear("blocks/mlp/fc2", f"{block}mlp.down_proj"),
    ]


def _rows(table: Callable[[ViT, str], list[Row]], prefix: Callable[[ViT], str]) -> Callable[[ViT], list[Row]]:
    """Written under the prefix of the class that holds the model; read without one, as `spell` leaves the names."""

    def rows(model: ViT) -> list[Row]:
        two = model.pool == "tok_dist"
        return [
            *table(model, prefix(model)),
            *table(model, ""),
            *linear("head", "cls_classifier" if two else "classifier"),
            *linear("head_dist", "distillation_classifier"),
        ]

    return rows


def _spell(prefix: str):
    attention = r"^(encoder\.layer\.\d+\.attention\.)"
    return renaming(
        (rf"^{prefix}\.", ""),
        (r"^layers\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
        (r"^layers\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
        (r"^layers\.", "encoder.layer."),
        *((rf"{attention}{memory}\.", rf"\1attention.{file}.") for file, memory in _QKV),
        (rf"{attention}o_proj\.", r"\1output.dense."),
    )


def _describe_vit(source: Source) -> Spec:
    config = read_config(source, _VIT)
    classes = head_size(source, "classifier.weight", "cls_classifier.weight")
    pooler = None if classes is not None else head_size(source, "pooler.dense.weight")
    if pooler is not None and config["pooler_act"] != "tanh":
        raise ValueError(
            f"{source.path}: the pooler's activation is {config['pooler_act']!r} and only tanh is supported. To load "
            "the model without its pooler, take the pooler's tensors out of the file."
        )
    return Spec(
        fields=read_fields(source, config)
        | dict(
            num_classes=classes,
            mlp_dim=config["intermediate_size"],
            class_token=True,
            dist_token="embeddings.distillation_token" in source.tensors,
            pool="tok_dist" if "cls_classifier.weight" in source.tensors else "tok",
            representation_size=pooler,
            qkv_bias="qkv" if config["qkv_bias"] else "",
        ),
        channels=config["num_channels"],
        grid=read_grid(config),
        posemb_resize="bicubic",
        patch_resize="bicubic_antialias",
        preprocess=read_preprocess(source, config["patch_size"]),
        class_names=read_class_names(source, classes),
        probabilities=read_probabilities(source),
        # Decoders of masked image modelling; a pooler that the classifier does not go through.
        unused=(r"^embeddings\.mask_token$", r"^decoder\.", *([r"^pooler\."] if classes is not None else [])),
    )


def _describe_dinov2(source: Source) -> Spec:
    registers = "embeddings.register_tokens" in source.tensors
    config = read_config(source, _DINOV2_REGISTERS if registers else _DINOV2)
    classes = head_size(source, "classifier.weight")
    swiglu = config["use_swiglu_ffn"]
    fields = read_fields(source, config) | dict(
        num_classes=classes,
        mlp="swiglu" if swiglu else "mlp",
        mlp_dim=_dinov2_mlp_dim(config["hidden_size"], config["mlp_ratio"], swiglu),
        class_token=True,
        registers=config["num_register_tokens"] if registers else 0,
        pool="tok" if classes is None else "tok_gap",
        qkv_bias="qkv" if config["qkv_bias"] else "",
        layer_scale=config["layerscale_value"],
    )
    return Spec(
        fields=fields | (dict(activation="silu") if swiglu else {}),  # whatever hidden_act says
        channels=config["num_channels"],
        grid=read_grid(config),
        posemb_resize="bicubic_antialias" if registers else "bicubic",
        patch_resize="bicubic_antialias",
        preprocess=read_preprocess(source, config["patch_size"]),
        class_names=read_class_names(source, classes),
        probabilities=read_probabilities(source),
        unused=(r"^embeddings\.mask_token$",),
    )


def _dinov2_mlp_dim(width: int, ratio: int, swiglu: bool) -> int:
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def _prefix_vit(name: str) -> Callable[[ViT], str]:
    """ViTModel is the class with a pooler; without one, a classifier of zero labels says the same."""
    return lambda model: "" if model.representation_size is not None else f"{name}."


def _prefix_dinov2(name: str) -> Callable[[ViT], str]:
    return lambda model: "" if model.num_classes is None else f"{name}."


def _config_vit(out: Outgoing, *, model_type: str, name: str) -> dict[str, dict[str, Any]]:
    model = out.model
    if model.dist_token != (model_type == "deit"):
        raise ValueError(f"{name}Model has {'no' if model.dist_token else 'a'} distillation token")
    head = "" if model.representation_size is not None else "ForImageClassification"
    config = dict(
        architectures=[name + (head or "Model") + ("WithTeacher" if head and model.pool == "tok_dist" else "")],
        model_type=model_type,
        **write_fields(out),
        intermediate_size=model.mlp_dim,
        qkv_bias=model.qkv_bias == "qkv",
    )
    if head:
        return write_files(out, config | write_labels(out))
    return write_files(out, config | dict(pooler_output_size=model.representation_size, pooler_act="tanh"))


def _config_mae(out: Outgoing) -> dict[str, dict[str, Any]]:
    if out.model.num_classes is not None or out.model.representation_size is not None:
        raise ValueError("ViTMAEModel has no head: write it as hf:vit")
    files = _config_vit(out, model_type="vit_mae", name="ViTMAE")
    # No patch is hidden: the class computes what our model computes. Pre-training goes on with mask_ratio=0.75.
    files["config.json"] |= dict(architectures=["ViTMAEModel"], mask_ratio=0.0)
    return files


def _config_dinov2(out: Outgoing, *, model_type: str, name: str) -> dict[str, dict[str, Any]]:
    model = out.model
    require_square(out, f"{name}Model")
    if bool(model.registers) != (model_type == "dinov2_with_registers"):
        raise ValueError(f"{name}Model has {'no ' if model.registers else ''}registers")
    swiglu = model.mlp == "swiglu"
    ratio = next((r for r in range(1, 17) if _dinov2_mlp_dim(model.width, r, swiglu) == model.mlp_dim), None)
    if ratio is None:
        rule = "two thirds of a whole multiple of the width, rounded up to 8" if swiglu else "a multiple of the width"
        raise ValueError(f"{name}Model makes mlp_dim {rule}, and {model.mlp_dim} is not, for a width of {model.width}")
    config = dict(
        architectures=[f"{name}Model" if model.num_classes is None else f"{name}ForImageClassification"],
        model_type=model_type,
        **write_fields(out),
        mlp_ratio=ratio,
        use_swiglu_ffn=swiglu,
        qkv_bias=model.qkv_bias == "qkv",
        layerscale_value=1.0 if model.layer_scale is None else model.layer_scale,
    )
    config |= write_labels(out) if model.num_classes is not None else {}
    return write_files(out, config | (dict(num_register_tokens=model.registers) if model.registers else {}))


def _mask_token(prefix: Callable[[ViT], str]) -> Callable[[Outgoing], dict[str, np.ndarray]]:
    """Only masked pre-training reads it, and the class wants one."""
    return lambda out: {f"{prefix(out.model)}embeddings.mask_token": np.zeros((1, out.model.width), np.float32)}


_BEFORE = "encoder.layer.0.layernorm_before.weight"
_REGISTERS = "embeddings.register_tokens"
_DISTILLATION = "embeddings.distillation_token"

_is_mae = recognise(["vit_mae"], present=[_PATCHES, _BEFORE], absent=[_DISTILLATION])

HF_VIT = Family(
    name="hf:vit",
    about="transformers ViTForImageClassification, ViTModel: a folder with config.json",
    matches=recognise(["vit"], present=[_PATCHES, _BEFORE], absent=[_DISTILLATION]),
    describe=_describe_vit,
    rows=_rows(_vit_table, _prefix_vit("vit")),
    spell=_spell("vit"),
    config=lambda out: _config_vit(out, model_type="vit", name="ViT"),
    token_positions=True,
)
HF_DEIT = Family(
    name="hf:deit",
    about="transformers DeiTForImageClassification (WithTeacher too), DeiTModel",
    matches=recognise(["deit"], present=[_PATCHES, _BEFORE, _DISTILLATION]),
    describe=_describe_vit,
    rows=_rows(_vit_table, _prefix_vit("deit")),
    spell=_spell("deit"),
    config=lambda out: _config_vit(out, model_type="deit", name="DeiT"),
    token_positions=True,
)
HF_VIT_MAE = Family(
    name="hf:vit_mae",
    about="transformers ViTMAEModel, ViTMAEForPreTraining: the encoder; the output is its class token, normalised",
    matches=lambda source: bool(source.config) and _is_mae(source),
    describe=_describe_vit,
    rows=_rows(_vit_table, lambda model: ""),
    spell=_spell("vit"),
    config=_config_mae,
    token_positions=True,
)
HF_DINOV2 = Family(
    name="hf:dinov2",
    about="transformers Dinov2Model, Dinov2ForImageClassification",
    matches=recognise(["dinov2"], present=[_PATCHES, "encoder.layer.0.norm1.weight"], absent=[_REGISTERS]),
    describe=_describe_dinov2,
    rows=_rows(_dinov2_table, _prefix_dinov2("dinov2")),
    spell=_spell("dinov2"),
    config=lambda out: _config_dinov2(out, model_type="dinov2", name="Dinov2"),
    extra=_mask_token(_prefix_dinov2("dinov2")),
    token_positions=True,
)
HF_DINOV2_WITH_REGISTERS = Family(
    name="hf:dinov2_with_registers",
    about="transformers Dinov2WithRegistersModel, Dinov2WithRegistersForImageClassification",
    matches=recognise(["dinov2_with_registers"], present=[_PATCHES, "encoder.layer.0.norm1.weight", _REGISTERS]),
    describe=_describe_dinov2,
    rows=_rows(_dinov2_table, _prefix_dinov2("dinov2_with_registers")),
    spell=_spell("dinov2_with_registers"),
    config=lambda out: _config_dinov2(out, model_type="dinov2_with_registers", name="Dinov2WithRegisters"),
    extra=_mask_token(_prefix_dinov2("dinov2_with_registers")),
    token_positions=True,
)
