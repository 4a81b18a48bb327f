"""The folder of one of our own runs as a source of weights: `load_pretrained("runs/digits")`.

This is the one file of the converter that knows checkpoints of training: it turns one into what a folder in our own
format would hold, so that the family "vit_flax" needs no second reader.

runs/digits                     the newest checkpoint
runs/digits:best                the best one, by `checkpoint.best_metric`
runs/digits/checkpoints/2400    that of a step
runs/digits:ema                 the moving average of the weights; also runs/digits:best:ema
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vit_flax.convert.families.own import config_json
from vit_flax.convert.preprocess import Evaluation, Preprocess
from vit_flax.convert.source import Source, Tensor
from vit_flax.convert.table import Outgoing
from vit_flax.models import make_model
from vit_flax.models.layout import stack_blocks
from vit_flax.models.patches import both_sides

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
    start = saved.config.get("init", {})  # completed: it has the ways of the family that the weights came from
    content = Outgoing(
        make_model(**fields).clone(scan=True),
        flat,
        channels=channels,
        image_size=(height, width),
        posemb_resize=start.get("posemb_resize", "bicubic_antialias"),
        patch_resize=start.get("patch_resize", "bicubic_antialias"),
        preprocess=preprocess_of(saved.preprocessing),
        class_names=saved.class_names,
        probabilities="sigmoid" if saved.config["loss"]["name"] == "sigmoid_xent" else "softmax",
    )
    return Source(path, tensors, config_json(content) | {"evaluation": asdict(evaluation_of(saved.preprocessing))})


def _split(path: str) -> tuple[Path, Any]:
    """The workdir, and the step as `load_params` takes it."""
    name = path.removesuffix(_AVERAGE)
    place = Path(name.removesuffix(_BEST))
    if place.parent.name == _CHECKPOINTS and place.name.isdigit():
        return place.parent.parent, int(place.name)
    return place, "best" if name.endswith(_BEST) else None


def evaluation_of(preprocessing: Mapping[str, Any]) -> Evaluation:
    """What the evaluation pictures of a run went through; the argument as of `preprocess_of`."""
    fixed = [op["size_px"] for op in preprocessing["transforms"] if op["op"] != "resize_small" and op.get("size_px")]
    # Without a resize all pictures have one size.
    size = both_sides(fixed[-1]) if fixed else tuple(preprocessing["image_shape"][:2])
    channels = preprocessing["image_shape"][2]
    mean, std = (tuple(preprocessing[k]) * (channels if len(preprocessing[k]) == 1 else 1) for k in ("mean", "std"))
    return Evaluation(size, tuple(preprocessing["transforms"]), mean, std)


def preprocess_of(preprocessing: Mapping[str, Any]) -> Preprocess | None:
    """The same as a `Preprocess`; None if it is more than a resize and a central crop of upright pictures.

    Args:
      preprocessing: as in the record of a checkpoint: `image_shape`, `transforms`, `mean`, `std`.
    """
    decode = {k: v for op in preprocessing["transforms"] if op["op"] == "decode" for k, v in op.items()}
    ops = [dict(op) for op in preprocessing["transforms"] if op["op"] != "decode"]
    how = {"filter": "bilinear", "antialias": True} | (ops[0] if ops else {})
    crop = _crop(ops)
    if crop is None or how["filter"] not in ("bilinear", "bicubic") or not decode.get("apply_exif", True):
        return None
    kept = {name: how[name] for name in ("filter", "antialias")}
    exact = evaluation_of(preprocessing)
    return Preprocess(exact.image_size, exact.mean, exact.std, **kept, **crop)


def _crop(ops: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The fields of `Preprocess` that say which part of a picture is seen; None if they cannot."""
    names = [op["op"] for op in ops]
    if names in ([], ["resize"]):
        return {"crop_fraction": None}
    if names not in (["resize", "central_crop"], ["resize_small", "central_crop"]):
        return None
    (height, width), (rows, columns) = both_sides(ops[1]["size_px"]), both_sides(ops[0]["size_px"])
    # One fraction for both sides: the shorter side decides alike only where the crop is as high as it is wide.
    if height * columns != width * rows:
        return None
    return {"crop_fraction": height / rows, "keep_aspect": names[0] == "resize_small"}
