"""Our own format: the parameter tree under its own names, and the fields of the model in config.json."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp

from vit_flax.convert.engine import parameter_shapes
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.source import CONFIG, Source
from vit_flax.convert.table import SAME, Family, Outgoing, Row, Spec
from vit_flax.models import ViT


def _describe(source: Source) -> Spec:
    config = source.config
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config["model"].items()}
    return Spec(
        fields=fields,
        channels=config["channels"],
        grid=tuple(config["grid"]) if "posemb/table" in source.tensors else None,
        posemb_resize=config["posemb_resize"],
        patch_resize="bicubic_antialias",
        preprocess=Preprocess.from_dict(config["preprocess"]) if config["preprocess"] else None,
        class_names=tuple(config["class_names"]) if config["class_names"] else None,
    )


def _rows(model: ViT) -> list[Row]:
    patch = (model.patch_size, model.patch_size) if isinstance(model.patch_size, int) else model.patch_size
    return [Row(path, path, SAME) for path in parameter_shapes(model, patch, 3)]


def _config(out: Outgoing) -> dict[str, dict[str, Any]]:
    ph, pw = (out.model.patch_size,) * 2 if isinstance(out.model.patch_size, int) else out.model.patch_size
    fields = {f.name: getattr(out.model, f.name) for f in dataclasses.fields(out.model)}
    content = {
        "format": "vit_flax",
        "model": {k: v for k, v in fields.items() if k not in ("parent", "name")}
        | {k: jnp.dtype(fields[k]).name for k in ("dtype", "param_dtype")},
        "channels": out.channels,
        "grid": [out.image_size[0] // ph, out.image_size[1] // pw],
        "posemb_resize": out.posemb_resize,
        "preprocess": out.preprocess.to_dict() if out.preprocess else None,
        "class_names": out.class_names,
    }
    return {CONFIG: json.loads(json.dumps(content))}


VIT_FLAX = Family(
    name="vit_flax",
    about="a folder written by vit_flax: config.json and model.safetensors under our own names",
    matches=lambda source: source.config.get("format") == "vit_flax",
    describe=_describe,
    rows=_rows,
    config=_config,
)
