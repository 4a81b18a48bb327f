"""What the checkpoints of transformers share: config.json, labels, names of activations, image processors.

The families themselves are in huggingface_vit.py, huggingface_dinov3.py and huggingface_clip.py. Epsilon, activation
and number of heads are not in the weights: without config.json such a file cannot be read. What config.json leaves out
has the default of its class, as in the library, which writes differences only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import CONFIG, PREPROCESSOR, Source
from vit_flax.convert.table import Outgoing
from vit_flax.models.patches import both_sides

Config = Mapping[str, Any]

# Theirs -> ours. Of several names for one function the first is the one that is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}
_FILTERS = {2: "bilinear", 3: "bicubic"}  # the numbers are Pillow's


def recognise(types: Sequence[str], *, present: Sequence[str], absent: Sequence[str] = ()) -> Callable[[Source], bool]:
    """A `matches` by names of tensors and, where there is a config.json, by its `model_type`."""

    def matches(source: Source) -> bool:
        names = source.tensors
        named = not source.config or source.config.get("model_type") in types
        return named and all(n in names for n in present) and not any(n in names for n in absent)

    return matches


def read_config(source: Source, defaults: Config) -> Config:
    """The configuration of the vision tower, complete.

    Raises: ValueError: there is none beside the weights.
    """
    if not source.config:
        raise ValueError(
            f"{source.path}: the weights do not say the number of heads, the activation or the epsilon; {CONFIG} does. "
            "Put it beside them and give the path of the folder."
        )
    config = source.config
    if "vision_config" in config:
        towers = [config["vision_config"] or {}]
        # The first CLIP files have a second dictionary, and the library lets it win, with the defaults.
        if old := config.get("vision_config_dict"):
            towers += [defaults, old]
        return {**defaults, **{k: v for tower in towers for k, v in tower.items()}}
    return {**defaults, **config}


def read_fields(source: Source, config: Config) -> dict[str, Any]:
    """The fields of `ViT` that every family takes from the same keys."""
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"{source.path}: hidden_act={config['hidden_act']!r} in {CONFIG} is unknown here; known are "
            f"{', '.join(ACTIVATIONS)}."
        )
    ph, pw = both_sides(config["patch_size"])
    return dict(
        patch_size=ph if ph == pw else (ph, pw),
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        activation=ACTIVATIONS[config["hidden_act"]],
        norm_eps=config["layer_norm_eps"],
    )


def write_fields(out: Outgoing) -> dict[str, Any]:
    """The inverse of `read_fields`, with the image size and the labels."""
    model = out.model
    ph, pw = model.patch_shape
    rows, columns = out.image_size
    return dict(
        patch_size=ph if ph == pw else [ph, pw],
        image_size=rows if rows == columns else [rows, columns],
        num_channels=out.channels,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        hidden_act=next(theirs for theirs, ours in ACTIVATIONS.items() if ours == model.activation),
        layer_norm_eps=model.norm_eps,
    )


def require_square(out: Outgoing, library_class: str) -> None:
    """Raises a ValueError for a grid or a patch with unequal sides, where the library's code assumes a square."""
    if out.image_size[0] != out.image_size[1] or len(set(out.model.patch_shape)) > 1:
        raise ValueError(
            f"{library_class} takes square images and patches, and these are {out.image_size} and "
            f"{out.model.patch_shape}: resample the positions first (load_pretrained(image_size=...))"
        )


def read_grid(config: Config) -> Grid:
    """Rows and columns of the position table; what the patch does not divide is cut off, as by a convolution."""
    (h, w), (ph, pw) = both_sides(config["image_size"]), both_sides(config["patch_size"])
    return h // ph, w // pw


def head_size(source: Source, *names: str) -> int | None:
    """The number of outputs of the first of some linear layers that is there; None if none is."""
    return next((source.tensors[n].shape[0] for n in names if n in source.tensors), None)


def read_class_names(source: Source, classes: int | None) -> tuple[str, ...] | None:
    """The labels of config.json; None where the library has only numbered them.

    Raises: ValueError: there are more or fewer of them than the head has outputs.
    """
    if classes is None or not source.config.get("id2label"):
        return None
    labels = source.config["id2label"]
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    if len(names) != classes:
        raise ValueError(
            f"{source.path}: {CONFIG} names {len(names)} classes (id2label) and the head has {classes} outputs. It "
            "does not belong to these weights: fetch both from the same place."
        )
    return None if names == _numbered(classes) else names


def read_probabilities(source: Source) -> str:
    """As the loss that config.json names; of classifiers without one, one class to a picture is the rule."""
    return _PROBLEMS.get(str(source.config.get("problem_type")), "softmax")


_PROBLEMS = {"multi_label_classification": "sigmoid", "regression": "none"}


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(classes))


def write_labels(out: Outgoing) -> dict[str, Any]:
    """`id2label` and its inverse, which also say the size of the head (none for no head), and what is not the rule."""
    names = out.class_names or _numbered(out.model.num_classes or 0)
    labels = {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
    problem = next((theirs for theirs, ours in _PROBLEMS.items() if ours == out.probabilities), None)
    return labels | ({"problem_type": problem} if problem else {})


def write_files(out: Outgoing, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json and, where the preprocessing is known and an image processor does it, preprocessor_config.json."""
    values = write_preprocess(out.preprocess) if out.preprocess is not None else None
    return {CONFIG: config} | ({PREPROCESSOR: values} if values else {})


def read_preprocess(source: Source, patch_size: int | Sequence[int]) -> Preprocess | None:
    """The image processor of preprocessor_config.json; None without the file, since class defaults are often wrong.

    Raises: ValueError: it describes something else than resize, central crop, normalise.
    """
    values = source.preprocessor
    if not values:
        return None

    def unknown(what: str) -> ValueError:
        return ValueError(
            f"{source.path}: {PREPROCESSOR} {what}, which is not supported here. Take the file away to load "
            "the weights without it, and prepare the images as its library does."
        )

    def on(switch: str, unless_said: bool = False) -> bool:
        return bool(values.get(switch, unless_said))

    if not on("do_resize") or "size" not in values:
        raise unknown("resizes nothing")
    if values.get("resample") not in _FILTERS:
        raise unknown(f"has resample={values.get('resample')}")
    # Without the switch, all classes rescale and normalise.
    normalised = on("do_normalize", unless_said=True)
    if not on("do_rescale", unless_said=True):
        raise unknown("has do_rescale=false: it leaves open whether pixels go from 0 to 1 or to 255")
    if normalised and not (values.get("image_mean") and values.get("image_std")):
        raise unknown("has no image_mean and image_std")
    resized, keep_aspect = _read_size(values)
    target = resized
    if on("do_center_crop"):
        crop = values["crop_size"]
        target = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else both_sides(crop)
    if resized is None or target is None or (keep_aspect and (not on("do_center_crop") or target[0] != target[1])):
        raise unknown(f"has size={values['size']} and do_center_crop={on('do_center_crop')}")
    if target[0] > resized[0] or target[1] > resized[1]:
        raise unknown(f"pads {values['size']} to {values['crop_size']}")
    # 384 with patches of 14: the library's convolution never sees the last 6 pixels.
    rows, columns = (side // patch * patch for side, patch in zip(target, both_sides(patch_size), strict=True))
    channels = len(values["image_mean"]) if normalised else 3
    # Their pixels are multiplied by the factor before the mean goes off; ours by 1 / 255. Old files leave it out.
    scale = 255 * values["rescale_factor"] if "rescale_factor" in values else 1.0
    stretched = (rows, columns) == resized and not keep_aspect
    preprocess = Preprocess(
        image_size=(rows, columns),
        mean=tuple(float(m) / scale for m in values["image_mean"]) if normalised else (0.0,) * channels,
        std=tuple(float(s) / scale for s in values["image_std"]) if normalised else (1 / scale,) * channels,
        crop_fraction=None if stretched else rows / resized[0],
        keep_aspect=keep_aspect or stretched,
        filter=_FILTERS[values["resample"]],
    )
    if not keep_aspect and preprocess.resized(*resized) != resized:
        raise unknown(f"crops {values['size']} to {target}")
    return preprocess


def _read_size(values: Config) -> tuple[Grid | None, bool]:
    """What is resized to, and whether that is the shorter side in the picture's own proportions."""
    size = values["size"]
    if isinstance(size, int):  # before transformers 4.26
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
        return (size, size), kind.startswith(("CLIP", "Bit"))
    if isinstance(size, Mapping):
        if set(size) == {"height", "width"}:
            return (size["height"], size["width"]), False
        return (both_sides(size["shortest_edge"]), True) if set(size) == {"shortest_edge"} else (None, False)
    return both_sides(size), False


def write_preprocess(preprocess: Preprocess) -> dict[str, Any] | None:
    """As the image processor that does the same; None where there is none: for a crop that is no square.

    They all antialias: `antialias=False` has no place here.
    """
    rows, columns = preprocess.image_size
    crop = {"do_center_crop": True, "crop_size": {"height": rows, "width": columns}}
    fraction = preprocess.crop_fraction
    if fraction is None:
        how: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": rows, "width": columns}}
    elif not preprocess.keep_aspect:
        size = {"height": round(rows / fraction), "width": round(columns / fraction)}
        how = {"image_processor_type": "DeiTImageProcessor", "size": size, **crop}
    elif rows == columns:
        how = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": round(rows / fraction)}, **crop}
    else:
        return None
    return how | {
        "do_convert_rgb": len(preprocess.mean) == 3,
        "do_resize": True,
        "resample": next(number for number, name in _FILTERS.items() if name == preprocess.filter),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
