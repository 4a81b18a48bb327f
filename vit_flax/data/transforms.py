"""Host transforms: what happens to one example before batching, on 8-bit pixels.

    transform = make_transform([{"op": "inception_crop", "size_px": 224}, {"op": "flip"}])
    transform({"image": jpeg_bytes, "label": 3, "id": "cat.jpg"}, rng)["image"]      # uint8 [224, 224, 3]

A transform is a list of operations, each a dict with its name under "op" and its arguments beside it. Decoding comes
first and happens once; `{"op": "decode", "channels": 1}` at the head of the list changes how. Each operation is a
frozen dataclass: its fields are its arguments, and calling it maps a Pillow image to a Pillow image.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vit_flax.data import decode

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def make_transform(ops: Sequence[Mapping[str, Any]]) -> "Transform":
    """Builds a transform from a config's list of operations.

    Args:
      ops: dicts such as {"op": "resize", "size_px": 224}; the names are the keys of `TRANSFORMS`.
    Raises: ValueError: an unknown operation, or arguments that it does not take; the message names its position.
    """
    built = [_make_op(position, dict(op)) for position, op in enumerate(ops, start=1)]
    for position, op in enumerate(built[1:], start=2):
        if isinstance(op, Decode):
            raise ValueError(f"operation {position} 'decode' must come first: images are decoded once")
    if not built or not isinstance(built[0], Decode):
        built.insert(0, Decode())
    return Transform(decode=built[0], ops=tuple(built[1:]))


@dataclasses.dataclass(frozen=True)
class Transform:
    """A picklable function from an example to an example whose image is uint8 [h, w, channels].

    Attributes:
      decode: how bytes become pixels.
      ops: the operations after it, in order.
    """

    decode: "Decode"
    ops: tuple[Any, ...]

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Decodes and transforms the image; the other entries pass through.

        Raises: DecodeError: the image cannot be decoded. ValueError: an operation draws random numbers and got no rng.
        """
        if rng is None and not self.deterministic:
            raise ValueError("this transform draws random numbers: call it with a numpy random Generator")
        picture = self.decode(example["image"], example["id"])
        ops = self.ops
        if ops and isinstance(ops[0], Resample):
            image = ops[0].read(picture, rng)
            ops = ops[1:]
        else:
            image = picture.load()
        for op in ops:
            image = op(image, rng)
        pixels = np.asarray(image)
        return {**example, "image": pixels if pixels.ndim == 3 else pixels[:, :, None]}

    @property
    def deterministic(self) -> bool:
        """Whether no operation draws random numbers."""
        return not any(op.random for op in self.ops)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Bytes to pixels; only at the head of the list.

    Attributes:
      channels: 3 for RGB (grey images are repeated), 1 for grey (ITU-R 601 luma).
      apply_exif: turns photographs upright that a camera stored on their side.
    """

    channels: int = 3
    apply_exif: bool = True
    random: ClassVar[bool] = False

    def __post_init__(self):
        if self.channels not in decode.MODES:
            raise ValueError(f"channels must be 1 or 3, found {self.channels!r}")

    def __call__(self, data: Any, record_id: str) -> decode.Picture:
        return decode.open_picture(data, record_id, channels=self.channels, apply_exif=self.apply_exif)


class Resample:
    """An operation that reads a box of the image at a given size, and can therefore start from a smaller decode.

    A subclass says which in `plan(width, height, rng) -> (box, size)`; the box is left, upper, right, lower in pixels,
    fractions allowed, and the size is width, height. It has the fields `filter` and `antialias`.
    """

    filter: str
    antialias: bool
    random: ClassVar[bool] = False

    def __post_init__(self):
        if self.filter not in FILTERS:
            raise ValueError(f"filter={self.filter!r} is not known: choose one of {', '.join(FILTERS)}")
        if not self.antialias and self.filter not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"filter={self.filter!r} always antialiases: choose nearest, bilinear or bicubic")

    def plan(self, width: int, height: int, rng: np.random.Generator | None):
        raise NotImplementedError

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        box, size = self.plan(image.width, image.height, rng)
        return resample(image, box, size, self.filter, self.antialias)

    def read(self, picture: decode.Picture, rng: np.random.Generator | None) -> Image.Image:
        """The same on an image that is not decoded yet."""
        width, height = picture.size
        box, size = self.plan(width, height, rng)
        shrink = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) if self.antialias else 1.0
        image = picture.load(shrink)
        if image.size != (width, height):
            x, y = image.width / width, image.height / height
            box = (box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height))
        return resample(image, box, size, self.filter, self.antialias)


def resample(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], filter: str, antialias: bool
) -> Image.Image:
    """Resizes a box of an image to a size (width, height)."""
    if box == (0, 0, *image.size) and size == image.size:
        return image
    if antialias:
        return image.resize(size, FILTERS[filter], box=box)
    # As TensorFlow's resize: each pixel is read between its neighbours, however far apart the samples lie.
    left, upper, right, lower = (round(edge) for edge in box)
    crop = image.crop((left, upper, right, lower))
    whole = (0, 0, *crop.size)
    return crop.transform(size, Image.Transform.EXTENT, whole, FILTERS[filter])


@dataclasses.dataclass(frozen=True)
class Resize(Resample):
    """Stretches the whole image to `size_px`, one number or (height, width)."""

    size_px: int | tuple[int, int]
    filter: str = "bilinear"
    antialias: bool = True

    def plan(self, width: int, height: int, rng: np.random.Generator | None):
        return (0, 0, width, height), _width_height(self.size_px)


def _width_height(size_px: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    return width, height


TRANSFORMS = {
    "decode": Decode,
    "resize": Resize,
}


def _make_op(position: int, arguments: dict[str, Any]) -> Any:
    name = arguments.pop("op", None)
    if name not in TRANSFORMS:
        near = difflib.get_close_matches(str(name), TRANSFORMS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"operation {position} {name!r} is not known{hint}: choose from {', '.join(TRANSFORMS)}")
    fields = {field.name: field for field in dataclasses.fields(TRANSFORMS[name])}
    unknown = [argument for argument in arguments if argument not in fields]
    missing = [n for n, field in fields.items() if field.default is dataclasses.MISSING and n not in arguments]
    if unknown or missing:
        signature = ", ".join(
            n if f.default is dataclasses.MISSING else f"{n}={f.default!r}" for n, f in fields.items()
        )
        problem = f"does not take {unknown}" if unknown else f"needs {missing}"
        raise ValueError(f"operation {position} {name!r} {problem}; its arguments are: {signature}")
    try:
        return TRANSFORMS[name](**arguments)
    except ValueError as error:
        raise ValueError(f"operation {position} {name!r}: {error}") from error
