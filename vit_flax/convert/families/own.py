"""Our own format: the parameter tree under its own names, and the fields of the model in config.json."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp

from vit_flax.convert.engine import parameter_shapes
from vit_flax.convert.preprocess import Evaluation, Preprocess
from vit_flax.convert.source import CONFIG, Source
from vit_flax.convert.table import PROBABILITIES, SAME, Family, Outgoing, Row, Spec
from vit_flax.models import ViT


def _describe(source: Source) -> Spec:
    config = source.config
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config["model"].items()}
    names, classes = config["class_names"], fields["num_classes"]
    if names and len(names) != classes:
        raise ValueError(f"{CONFIG} names {len(names)} classes and the head has {classes} outputs: fetch both anew.")
    if config["probabilities"] not in PROBABILITIES:
        raise ValueError(
            f"{CONFIG} has probabilities={config['probabilities']!r}: expected one of {', '.join(PROBABILITIES)}."
        )
    return Spec(
        fields=fields,
        channels=config["channels"],
        grid=tuple(config["grid"]) if "posemb/table" in source.tensors else None,
        posemb_resize=config["posemb_resize"],
        patch_resize=config["patch_resize"],
        preprocess=Preprocess.from_dict(config["preprocess"]) if config["preprocess"] else None,
        evaluation=Evaluation.from_dict(config["evaluation"]) if "evaluation" in config else None,
        class_names=tuple(names) if names else None,
        probabilities=config["probabilities"],
    )


def _rows(model: ViT) -> list[Row]:
    return [Row(path, path, SAME) for path in parameter_shapes(model, model.patch_shape, 3)]


def config_json(out: Outgoing) -> dict[str, Any]:
    """The contents of config.json in our own format."""
    model, (ph, pw) = out.model, out.model.patch_shape
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")}
    content = {
        "format": "vit_flax",
        "model": fields | {k: jnp.dtype(fields[k]).name for k in ("dtype", "param_dtype")},
        "channels": out.channels,
        "grid": [out.image_size[0] // ph, out.image_size[1] // pw],
        "posemb_resize": out.posemb_resize,
        "patch_resize": out.patch_resize,
        "preprocess": dataclasses.asdict(out.preprocess) if out.preprocess else None,
        "class_names": out.class_names,
        "probabilities": out.probabilities,
    }
    return json.loads(json.dumps(content))


VIT_FLAX = Family(
    name="vit_flax",
    about="written by vit_flax: a folder with config.json and model.safetensors, or the workdir of a run",
    matches=lambda source: source.config.get("format") == "vit_flax",
    describe=_describe,
    rows=_rows,
    config=lambda out: {CONFIG: config_json(out)},
)
