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

from vit_flax.data import decode, geometry, policies


def make_transform(ops: Sequence[Mapping[str, Any]]) -> "Transform":
    """Builds a transform from a config's list of operations.

    Args:
      ops: dicts such as {"op": "resize", "size_px": 224}; the names are the keys of `TRANSFORMS`.
    Raises: ValueError: an unknown operation, or arguments that it does not take; the message names its position.
    """
    built = [_make_op(position, op) for position, op in enumerate(ops, start=1)]
    for position, op in enumerate(built[1:], start=2):
        if isinstance(op, Decode):
            raise ValueError(f"operation {position} 'decode' must come first: images are decoded once")
    if not built or not isinstance(built[0], Decode):
        built.insert(0, Decode())
    return Transform(decode=built[0], ops=tuple(built[1:]))


_NEVER_DRAWN_FROM = np.random.default_rng(0)  # deterministic operations get a generator and leave it alone


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
        rng = _NEVER_DRAWN_FROM if rng is None else rng
        picture = self.decode(example["image"], example["id"])
        ops = self.ops
        if ops and isinstance(ops[0], geometry.Plan):
            image, ops = ops[0].read(picture, rng), ops[1:]
        else:
            image = picture.load()
        for op in ops:
            image = _apply(op, image, rng)
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
      codec: one of `decode.CODECS`: "pillow", or "opencv" for colour JPEGs (an extra dependency).
      oversampling: where the next operation shrinks the image, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long
        as that leaves so many times the resolution needed. 1 is fastest; infinity always decodes in full.
    """

    channels: int = 3
    apply_exif: bool = True
    codec: str = "pillow"
    oversampling: float = 1.25
    random: ClassVar[bool] = False

    def __post_init__(self):
        if self.channels not in decode.MODES:
            raise ValueError(f"channels must be 1 or 3, found {self.channels!r}")
        if self.codec not in decode.CODECS:
            raise ValueError(f"codec={self.codec!r} is not known: choose one of {', '.join(decode.CODECS)}")
        if not self.oversampling >= 1:
            raise ValueError(f"oversampling must be 1 or more, found {self.oversampling!r}")
        if self.codec == "opencv":
            decode.import_opencv()

    def __call__(self, data: Any, record_id: str) -> decode.Picture:
        return decode.open_picture(
            data,
            record_id,
            channels=self.channels,
            apply_exif=self.apply_exif,
            codec=self.codec,
            oversampling=self.oversampling,
        )


TRANSFORMS = {
    "decode": Decode,
    "resize": geometry.Resize,
    "resize_small": geometry.ResizeSmall,
    "central_crop": geometry.CentralCrop,
    "random_crop": geometry.RandomCrop,
    "pad_and_crop": geometry.PadAndCrop,
    "inception_crop": geometry.InceptionCrop,
    "flip": geometry.Flip,
    "color_jitter": policies.ColorJitter,
    "randaugment": policies.RandAugment,
    "three_augment": policies.ThreeAugment,
    "autoaugment_cifar": policies.AutoAugmentCifar,
}


def _apply(op: Any, image: Image.Image | np.ndarray, rng: np.random.Generator) -> Image.Image | np.ndarray:
    """Operations map Pillow images; the mirror takes OpenCV's arrays as well, which saves two copies."""
    if isinstance(image, np.ndarray):
        if isinstance(op, geometry.Flip):
            return op.flip_pixels(image, rng)
        image = Image.fromarray(image)
    return op(image, rng)


def _make_op(position: int, op: Mapping[str, Any]) -> Any:
    if not hasattr(op, "keys"):  # a ConfigDict is a mapping, but not by its class
        raise ValueError(
            f"operation {position} is {op!r}: write it as dict(op=NAME) with its arguments beside the name"
        )
    arguments = dict(op)
    name = arguments.pop("op", None)
    if name not in TRANSFORMS:
        near = difflib.get_close_matches(str(name), TRANSFORMS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"operation {position} {name!r} is not known{hint}: choose from {', '.join(TRANSFORMS)}")
    fields = {field.name: field for field in dataclasses.fields(TRANSFORMS[name])}
    unknown = [argument for argument in arguments if argument not in fields]
    missing = [n for n, field in fields.items() if field.default is dataclasses.MISSING and n not in arguments]
    signature = ", ".join(n if f.default is dataclasses.MISSING else f"{n}={f.default!r}" for n, f in fields.items())
    if unknown or missing:
        problem = f"does not take {unknown}" if unknown else f"needs {missing}"
        raise ValueError(f"operation {position} {name!r} {problem}; its arguments are: {signature}")
    try:
        # Lists are what a config becomes on its way through JSON.
        return TRANSFORMS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except ValueError as error:
        raise ValueError(f"operation {position} {name!r}: {error}") from error
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"operation {position} {name!r} has an argument of the wrong type ({error}), found {arguments}; "
            f"its arguments are: {signature}"
        ) from error
