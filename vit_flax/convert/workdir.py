"""The folder of one of our own runs as a source of weights: `load_pretrained("runs/digits")`.

This is the one file of the converter that knows checkpoints and configs of training: it turns a workdir into what a
folder in our own format would hold, so that the family "vit_flax" needs no second reader.

runs/digits                     the newest checkpoint
runs/digits/checkpoints/2400    that of a step
runs/digits:ema                 the moving average of the weights
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vit_flax.checkpoint import load_params
from vit_flax.convert.families.own import config_json
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.source import CONFIG, Source, Tensor
from vit_flax.models import make_model
from vit_flax.models.layout import stack_blocks

_CHECKPOINTS = "checkpoints"
_AVERAGE = ":ema"


def is_workdir(path: str) -> bool:
    """Whether a path is that of a run, or of one checkpoint of it."""
    folder, _ = _split(path)
    return (folder / _CHECKPOINTS).is_dir() and (folder / CONFIG).is_file()


def open_workdir(path: str) -> Source:
    """Reads the parameters of a run.

    Raises:
      FileNotFoundError: the run has no checkpoint, or not that one.
      ValueError: config.json cannot be read, or the run kept no moving average.
    """
    folder, step = _split(path)
    record = _read_record(folder / CONFIG)
    average = path.endswith(_AVERAGE)
    params = stack_blocks(load_params(folder, step=step, ema=average).params)
    flat: Any = flatten_dict(params, sep="/")
    tensors = {name: Tensor(name, w.shape, w.dtype, lambda w=w: w) for name, w in flat.items()}
    return Source(path, tensors, _describe(record))


def _split(path: str) -> tuple[Path, int | None]:
    place = Path(path.removesuffix(_AVERAGE))
    if place.parent.name == _CHECKPOINTS and place.name.isdigit():
        return place.parent.parent, int(place.name)
    return place, None


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        return {part: record[part] for part in ("config", "image_shape", "class_names")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: not the record of a run ({error!r}).") from error


def _describe(record: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of our own format says, from that of a run."""
    config, (height, width, channels) = record["config"], record["image_shape"]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["model"].items()}
    model = make_model(**fields).clone(scan=True)
    return config_json(
        model,
        channels=channels,
        image_size=(height, width),
        posemb_resize=config.get("init", {}).get("posemb_resize") or "bicubic_antialias",
        preprocess=preprocess_of(config, (height, width), channels),
        class_names=record["class_names"],
    )


def preprocess_of(config: Mapping[str, Any], size: tuple[int, int], channels: int) -> Preprocess | None:
    """What the evaluation pictures of a run went through; None if that is more than a resize and a central crop."""
    mean, std = (_per_channel(config["augment"][k], channels) for k in ("mean", "std"))
    ops = [dict(op) for op in config["data"]["eval_transforms"] if op["op"] != "decode"]
    names = [op["op"] for op in ops]
    crop: float | None = None
    if names == ["resize_small", "central_crop"]:
        cut = ops[1]["size_px"]
        crop = min(cut if isinstance(cut, Sequence) else (cut,)) / ops[0]["size_px"]
    elif names not in ([], ["resize"]):
        return None
    how = {"filter": "bilinear", "antialias": True} | (ops[0] if ops else {})
    if how["filter"] not in ("bilinear", "bicubic"):
        return None
    return Preprocess(size, mean, std, crop, filter=how["filter"], antialias=how["antialias"])


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) * (channels if len(values) == 1 else 1)
