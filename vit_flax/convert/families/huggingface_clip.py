"""The vision towers of SigLIP, SigLIP2 (one resolution) and CLIP, as transformers writes and reads them.

A tower comes alone, with a head on top, or beside its text tower. Its prefix `vision_model.` was left out by some
versions; `spell` takes it off, and files are written with it, which every version reads. CLIPForImageClassification is
not supported: it averages tokens that have not been through the final LayerNorm.
"""

from typing import Any

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
    LINEAR,
    LINEAR_FROM_HEADS,
    SAME,
    TOKEN,
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

# The defaults of SiglipVisionConfig and CLIPVisionConfig (transformers 5.24).
_SIZES = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
    image_size=224,
)  # fmt: skip
_SIGLIP = dict(
    **_SIZES, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True
)  # fmt: skip
_CLIP = dict(**_SIZES, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)

_SIGLIP_TYPES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
_PREFIX = "vision_model."
_PATCHES = "embeddings.patch_embedding.weight"
_CLASS_TOKEN = "embeddings.class_embedding"
_TEXT_TOWER = (r"^text_model\.", r"^text_projection\.", r"^logit_(scale|bias)$")
_spell = renaming((r"^vision_model\.", ""))


def _table(model: ViT, prefix: str) -> list[Row]:
    """The rows of a tower under one prefix."""
    e, b, head = f"{prefix}embeddings.", prefix + "encoder.layers.{i}.", f"{prefix}head."
    names = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    return [
        Row("cls_token/token", f"{e}class_embedding", TOKEN),
        *positions(model, f"{e}position_embedding.weight", flat=True),
        Row("patch_embed/kernel", f"{e}patch_embedding.weight", convolution(model.patch_size)),
        Row("patch_embed/bias", f"{e}patch_embedding.bias", SAME),
        *norm("pre_norm", f"{prefix}pre_layrnorm"),  # the library's spelling
        *norm("blocks/norm1", f"{b}layer_norm1"),
        *[row for ours, theirs in names for row in linear(f"blocks/attention/{ours}", f"{b}self_attn.{theirs}")],
        *linear("blocks/attention/out", f"{b}self_attn.out_proj", LINEAR_FROM_HEADS),
        *norm("blocks/norm2", f"{b}layer_norm2"),
        *linear("blocks/mlp/fc1", f"{b}mlp.fc1"),
        *linear("blocks/mlp/fc2", f"{b}mlp.fc2"),
        *norm("norm", f"{prefix}post_layernorm"),
        Row("pool/probe", f"{head}probe", SAME),
        *fused("pool/attention", f"{head}attention.in_proj", ("query", "key", "value"), join="_"),
        *linear("pool/attention/out", f"{head}attention.out_proj", LINEAR_FROM_HEADS),
        *norm("pool/norm", f"{head}layernorm"),
        *linear("pool/mlp/fc1", f"{head}mlp.fc1"),
        *linear("pool/mlp/fc2", f"{head}mlp.fc2"),
    ]


def _rows_siglip(model: ViT) -> list[Row]:
    return [*_table(model, _PREFIX), *_table(model, ""), *linear("head", "classifier")]


def _rows_clip(model: ViT) -> list[Row]:
    return [*_table(model, _PREFIX), *_table(model, ""), Row("head/kernel", "visual_projection.weight", LINEAR)]


def _describe_siglip(source: Source) -> Spec:
    if len(source.shape(_PATCHES)) == 2:
        raise ValueError(
            f"{source.path}: SigLIP2 NaFlex cuts every picture into its own number of patches, which is not supported. "
            "Take the checkpoint of the same size with one resolution."
        )
    config = read_config(source, _SIGLIP)
    classes = head_size(source, "classifier.weight")
    # The classifier takes the mean over the patches, whether or not the file holds an attention pooling.
    pool = "map" if classes is None and config["vision_use_head"] else "gap"
    return Spec(
        fields=read_fields(source, config)
        | dict(num_classes=classes, mlp_dim=config["intermediate_size"], class_token=False, pool=pool),
        channels=config["num_channels"],
        grid=read_grid(config),
        posemb_resize="bicubic",
        patch_resize="bicubic_antialias",
        preprocess=read_preprocess(source, config["patch_size"]),
        class_names=read_class_names(source, classes),
        probabilities=read_probabilities(source),
        unused=(*_TEXT_TOWER, r"position_ids$", *([r"^head\."] if pool == "gap" else [])),
    )


def _describe_clip(source: Source) -> Spec:
    config = read_config(source, _CLIP)
    projected = head_size(source, "visual_projection.weight")
    return Spec(
        fields=read_fields(source, config)
        | dict(
            num_classes=projected,
            mlp_dim=config["intermediate_size"],
            class_token=True,
            patch_bias=False,
            pre_norm=True,
            norm_after_pool=True,
            pool="tok",
        ),
        channels=config["num_channels"],
        grid=read_grid(config),
        posemb_resize="bicubic",
        patch_resize="bicubic_antialias",
        preprocess=read_preprocess(source, config["patch_size"]),
        unused=(*_TEXT_TOWER, r"position_ids$"),
        constants={} if projected is None else {"head/bias": 0.0},
    )


def _config_siglip(out: Outgoing) -> dict[str, dict[str, Any]]:
    model = out.model
    require_square(out, "SiglipVisionModel")
    tower = dict(
        model_type="siglip_vision_model",
        **write_fields(out),
        intermediate_size=model.mlp_dim,
        vision_use_head=model.pool == "map",
    )
    if model.pool == "map":
        return write_files(out, dict(architectures=["SiglipVisionModel"], **tower))
    if model.num_classes is None:
        raise ValueError("SiglipForImageClassification, the class that averages the patches, needs a classifier")
    config = dict(architectures=["SiglipForImageClassification"], model_type="siglip", vision_config=tower)
    return write_files(out, config | write_labels(out))


def _config_clip(out: Outgoing) -> dict[str, dict[str, Any]]:
    model = out.model
    require_square(out, "CLIPVisionModel")
    if out.class_names is not None:
        raise ValueError("CLIPVisionModelWithProjection has no place for class names")
    config = dict(
        architectures=["CLIPVisionModel" if model.num_classes is None else "CLIPVisionModelWithProjection"],
        model_type="clip_vision_model",
        **write_fields(out),
        intermediate_size=model.mlp_dim,
    )
    return write_files(out, config | ({} if model.num_classes is None else dict(projection_dim=model.num_classes)))


HF_SIGLIP = Family(
    name="hf:siglip",
    about="transformers SiglipVisionModel, SiglipForImageClassification, the vision tower of SiglipModel; SigLIP2 too",
    matches=recognise(_SIGLIP_TYPES, present=[_PATCHES], absent=[_CLASS_TOKEN]),
    describe=_describe_siglip,
    rows=_rows_siglip,
    spell=_spell,
    config=_config_siglip,
)
HF_CLIP = Family(
    name="hf:clip",
    about="transformers CLIPVisionModel (WithProjection too), the vision tower of CLIPModel",
    matches=recognise(["clip", "clip_vision_model"], present=[_PATCHES, _CLASS_TOKEN]),
    describe=_describe_clip,
    rows=_rows_clip,
    spell=_spell,
    config=_config_clip,
    token_positions=True,
)
