"""The folder of one of our own runs as a source of weights: `load_pretrained("runs/digits")`.

This is the one file of the converter that knows checkpoints of training: it turns one into what a folder in our own
format would hold, so that the family "vit_flax" needs no second reader.

runs/digits                     the newest checkpoint
runs/digits:best                the best one, by `checkpoint.best_metric`
runs/digits/checkpoints/2400    that of a step
runs/digits:ema                 the moving average of the weights; also runs/digits:best:ema
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vit_flax.convert.families.own import config_json
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.source import Source, Tensor
from vit_flax.models import make_model
from vit_flax.models.layout import stack_blocks

_CHECKPOINTS = "checkpoints"
_AVERAGE, _BEST = ":ema", ":best"


def is_workdir(path: str) -> bool:
    """Whether a path is that of a run, or of one checkpoint of it."""
    return (_split(path)[0] / _CHECKPOINTS).is_dir()


def open_workdir(path: str) -> Source:
    """Reads the parameters of a run, checked against their checksums.

    Raises:
      FileNotFoundError: the run has no checkpoint, or not that one.
      ValueError: the run kept no moving average, or has no best checkpoint.
      OSError: the checkpoint is damaged.
    """
    from vit_flax.checkpoint import load_params

    folder, step = _split(path)
    saved = load_params(folder, step=step, ema=path.endswith(_AVERAGE))
    flat: Any = flatten_dict(stack_blocks(saved.params), sep="/")
    tensors = {name: Tensor(name, w.shape, w.dtype, lambda w=w: w) for name, w in flat.items()}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.config["model"].items()}
    height, width, channels = saved.preprocessing["image_shape"]
    config = config_json(
        make_model(**fields).clone(scan=True),
        channels=channels,
        image_size=(height, width),
        posemb_resize=saved.config.get("init", {}).get("posemb_resize") or "bicubic_antialias",
        preprocess=preprocess_of(saved.preprocessing),
        class_names=saved.class_names,
    )
    return Source(path, tensors, config)


def _split(path: str) -> tuple[Path, Any]:
    """The workdir, and the step as `load_params` takes it."""
    name = path.removesuffix(_AVERAGE)
    place = Path(name.removesuffix(_BEST))
    if place.parent.name == _CHECKPOINTS and place.name.isdigit():
        return place.parent.parent, int(place.name)
    return place, "best" if name.endswith(_BEST) else None


def preprocess_of(preprocessing: Mapping[str, Any]) -> Preprocess | None:
    """What the evaluation pictures of a run went through; None if that is more than a resize and a central crop.

    Args:
      preprocessing: as in the record of a checkpoint: `image_shape`, `transforms`, `mean`, `std`.
    """
    height, width, channels = preprocessing["image_shape"]
    ops = [dict(op) for op in preprocessing["transforms"] if op["op"] != "decode"]
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
    mean, std = (tuple(preprocessing[k]) * (channels if len(preprocessing[k]) == 1 else 1) for k in ("mean", "std"))
    kept = {name: how[name] for name in ("filter", "antialias")}
    return Preprocess((height, width), mean, std, crop_fraction=crop, **kept)
