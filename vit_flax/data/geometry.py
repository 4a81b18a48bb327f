"""Operations that choose which part of an image is seen, and at what size: crops, resizes, the mirror.

All of them plan before they touch pixels: `plan(width, height, rng)` gives a box and a size, so that a transform that
starts with one decodes a large JPEG at 1/2, 1/4 or 1/8 when the box allows it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vit_flax.data import decode

Edge = int | float
Box = tuple[Edge, Edge, Edge, Edge]
Size = tuple[int, int]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": None,  # OpenCV's
}
_ALIASING_FILTERS = ("nearest", "bilinear")  # without antialiasing Pillow's bicubic is another curve than TensorFlow's


class Plan:
    """An operation that reads a box of the image at a given size.

    A subclass says which in `plan(width, height, rng) -> (box, size)`; the box is left, upper, right, lower in pixels,
    fractions allowed, and the size is width, height.
    """

    filter = "nearest"
    antialias = True
    random: ClassVar[bool] = False

    def __post_init__(self):
        _check_size(self.size_px, pair=not isinstance(self, ResizeSmall))  # type: ignore[attr-defined]
        if self.filter not in FILTERS:
            raise ValueError(f"filter={self.filter!r} is not known: choose one of {', '.join(FILTERS)}")
        if not self.antialias and self.filter not in _ALIASING_FILTERS:
            raise ValueError(f"antialias=False needs filter 'nearest' or 'bilinear', found {self.filter!r}")
        if self.filter == "area":
            decode.import_opencv()

    def plan(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, Size]:
        raise NotImplementedError

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        box, size = self.plan(image.width, image.height, rng)
        return resample(image, box, size, self.filter, self.antialias)

    def read(self, picture: decode.Picture, rng: np.random.Generator) -> Image.Image | np.ndarray:
        """The same on an image that is not decoded yet; the "area" filter leaves the result as an array."""
        width, height = picture.size
        box, size = self.plan(width, height, rng)
        shrink = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) if self.antialias else 1.0
        image = picture.load_pixels(shrink) if self.filter == "area" else picture.load(shrink)
        decoded = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
        # Not the ratio of the sizes: the last row and column of a smaller decode stand for less than a full pixel.
        factor = 1 if decoded == (width, height) else picture.reduction(shrink)
        box = (box[0] / factor, box[1] / factor, box[2] / factor, box[3] / factor)
        if isinstance(image, np.ndarray):
            return resample_area(image, box, size)
        return resample(image, box, size, self.filter, self.antialias)


def resample(image: Image.Image, box: Box, size: Size, filter: str, antialias: bool) -> Image.Image:
    """Reads a box (left, upper, right, lower) of an image at a size (width, height).

    Args:
      image: to read from.
      box: in pixels; fractions are rounded where the filter is "area" or does not antialias.
      size: of the result.
      filter: a key of `FILTERS`. "area" averages (OpenCV's INTER_AREA) and enlarges bicubically.
      antialias: False reads every pixel between its neighbours however far apart the samples lie, as TensorFlow's
        resize does unless told otherwise.
    """
    if filter == "area":
        return Image.fromarray(resample_area(np.asarray(image), box, size))
    if (box[2] - box[0], box[3] - box[1]) == size and all(edge == int(edge) for edge in box):
        left, upper, right, lower = (int(edge) for edge in box)
        return image if size == image.size else image.crop((left, upper, right, lower))
    if antialias:
        return image.resize(size, FILTERS[filter], box=box)
    left, upper, right, lower = (round(edge) for edge in box)
    crop = image.crop((left, upper, right, lower))
    return crop.transform(size, Image.Transform.EXTENT, (0, 0, *crop.size), FILTERS[filter])


def resample_area(pixels: np.ndarray, box: Box, size: Size) -> np.ndarray:
    """The "area" filter of `resample` on an array."""
    cv2 = decode.import_opencv()
    left, upper, right, lower = (round(edge) for edge in box)
    crop = pixels[upper : max(lower, upper + 1), left : max(right, left + 1)]
    # A side that shrinks does so first: the cubic filter, which enlarges the other one, would skip pixels of it.
    smaller = min(size[0], crop.shape[1]), min(size[1], crop.shape[0])
    x, y = crop.shape[1] / smaller[0], crop.shape[0] / smaller[1]
    if max(x, y) > 2 or min(x, y) == 1:
        crop = cv2.resize(crop, smaller, interpolation=cv2.INTER_AREA)
    else:
        # Enlarging cannot alias and means of 2 x 2 are exact: nearly INTER_AREA's picture, in half the time.
        twice = cv2.resize(crop, (2 * smaller[0], 2 * smaller[1]), interpolation=cv2.INTER_LINEAR)
        crop = cv2.resize(twice, smaller, interpolation=cv2.INTER_AREA)
    return crop if smaller == size else cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC)


@dataclasses.dataclass(frozen=True)
class Resize(Plan):
    """Stretches the whole image to `size_px`.

    Attributes:
      size_px: one number, or (height, width).
      filter: a key of `FILTERS`.
      antialias: see `resample`.
    """

    size_px: int | tuple[int, int]
    filter: str = "bilinear"
    antialias: bool = True

    def plan(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, Size]:
        return (0, 0, width, height), _width_height(self.size_px)


@dataclasses.dataclass(frozen=True)
class ResizeSmall(Plan):
    """Scales the image, keeping its proportions, so that its shorter side is `size_px`; the longer one is rounded."""

    size_px: int
    filter: str = "bilinear"
    antialias: bool = True

    def plan(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, Size]:
        scale = self.size_px / min(width, height)
        size = (max(self.size_px, round(width * scale)), max(self.size_px, round(height * scale)))
        return (0, 0, width, height), size


@dataclasses.dataclass(frozen=True)
class CentralCrop(Plan):
    """Cuts the middle out: `size_px`, one number or (height, width); odd margins put the extra pixel last."""

    size_px: int | tuple[int, int]

    def plan(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, Size]:
        size = _width_height(self.size_px)
        room = _room("central_crop", width, height, size)
        left, upper = room[0] // 2, room[1] // 2
        return (left, upper, left + size[0], upper + size[1]), size


@dataclasses.dataclass(frozen=True)
class RandomCrop(Plan):
    """Cuts `size_px` (one number or (height, width)) out at a uniform place."""

    size_px: int | tuple[int, int]
    random: ClassVar[bool] = True

    def plan(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, Size]:
        size = _width_height(self.size_px)
        room = _room("random_crop", width, height, size)
        left, upper = (int(rng.integers(pixels + 1)) for pixels in room)
        return (left, upper, left + size[0], upper + size[1]), size


@dataclasses.dataclass(frozen=True)
class PadAndCrop:
    """Pads every side by `pad_px` and cuts the size out at a uniform place (CIFAR; DeiT III's simple random crop).

    Attributes:
      pad_px: pixels added to every side.
      size_px: one number or (height, width); None is the size of the image before padding.
      mode: "zero", "reflect" or "edge".
    """

    pad_px: int
    size_px: int | tuple[int, int] | None = None
    mode: str = "zero"
    random: ClassVar[bool] = True

    def __post_init__(self):
        _check_size(1 if self.size_px is None else self.size_px, pair=True)
        if not isinstance(self.pad_px, int) or self.pad_px < 0:
            raise ValueError(f"pad_px={self.pad_px!r} must be a whole number of pixels, 0 or more")
        if self.mode not in _PAD_MODES:
            raise ValueError(f"mode={self.mode!r} is not known: choose one of {', '.join(_PAD_MODES)}")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.mode == "reflect" and self.pad_px >= min(image.size):
            raise ValueError(f"cannot reflect {self.pad_px} px of an image of {image.width} x {image.height}")
        sides = ((self.pad_px, self.pad_px),) * 2
        pixels = np.asarray(image)
        padded = np.pad(pixels, sides + ((0, 0),) * (pixels.ndim - 2), _PAD_MODES[self.mode])
        crop = RandomCrop(self.size_px or (image.height, image.width))
        return crop(Image.fromarray(padded), rng)


_PAD_MODES: dict[str, Any] = {"zero": "constant", "reflect": "reflect", "edge": "edge"}


@dataclasses.dataclass(frozen=True)
class InceptionCrop(Plan):
    """Cuts out a box of random area and proportions and resizes it to `size_px` (arXiv:1409.4842, section 6).

    Attributes:
      size_px: one number or (height, width).
      area: least and largest area of the box, as a fraction of the image's.
      aspect: least and largest width / height of the box.
      law: "area": area uniform, proportions log-uniform, the largest central box after ten misses (torchvision, timm).
        "tf_inception": proportions uniform, height uniform given them, which favours small boxes
        (tf.image.sample_distorted_bounding_box, behind AugReg and big_vision).
      filter: a key of `FILTERS`.
      antialias: see `resample`.
    """

    size_px: int | tuple[int, int]
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    law: str = "area"
    filter: str = "bilinear"
    antialias: bool = True
    random: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.law not in CROP_LAWS:
            raise ValueError(f"law={self.law!r} is not known: choose one of {', '.join(CROP_LAWS)}")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"area and aspect must be (least, largest), found {self.area} and {self.aspect}")

    def plan(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, Size]:
        return CROP_LAWS[self.law](width, height, self.area, self.aspect, rng), _width_height(self.size_px)


def area_uniform_box(width: int, height: int, area, aspect, rng: np.random.Generator) -> Box:
    """Draws a box as torchvision's and timm's RandomResizedCrop do."""
    logs = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(*logs))
        wide, tall = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            upper, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            return (left, upper, left + wide, upper + tall)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    wide, tall = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, upper = (width - wide) // 2, (height - tall) // 2
    return (left, upper, left + wide, upper + tall)


def tf_inception_box(width: int, height: int, area, aspect, rng: np.random.Generator) -> Box:
    """Draws a box by the law of tf.image.sample_distorted_bounding_box with a whole-image bounding box."""
    least, largest = area[0] * width * height, area[1] * width * height
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        lowest = round(math.sqrt(least / ratio))
        highest = min(round(math.sqrt(largest / ratio)), math.floor((width + 0.5 - 1e-7) / ratio), height)
        lowest = min(lowest, highest)
        tall = int(rng.integers(lowest, highest + 1))
        # Rounding may have left the range of areas: try one row more, then one less, then draw again.
        if tall * round(tall * ratio) < least:
            tall += 1
        if tall * round(tall * ratio) > largest:
            tall -= 1
        wide = round(tall * ratio)
        if least <= wide * tall <= largest and 0 < wide <= width and 0 < tall <= height:
            # The last row and the last column are never reached: so it is published.
            upper = int(rng.integers(height - tall)) if tall < height else 0
            left = int(rng.integers(width - wide)) if wide < width else 0
            return (left, upper, left + wide, upper + tall)
    return (0, 0, width, height)


CROP_LAWS = {"area": area_uniform_box, "tf_inception": tf_inception_box}


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors the image left to right with probability `prob`."""

    prob: float = 0.5
    random: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob={self.prob} must lie in 0..1")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.prob else image

    def flip_pixels(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The same on an array that OpenCV has resized."""
        return decode.import_opencv().flip(pixels, 1) if rng.random() < self.prob else pixels


def _check_size(size_px: Any, *, pair: bool) -> None:
    sides = size_px if pair and isinstance(size_px, tuple) and len(size_px) == 2 else (size_px,)
    if not all(isinstance(side, int) and side > 0 for side in sides):
        expected = "a whole number of pixels, 1 or more" + (", or (height, width)" if pair else "")
        raise ValueError(f"size_px={size_px!r} must be {expected}")


def _width_height(size_px: int | Sequence[int]) -> Size:
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    return width, height


def _room(name: str, width: int, height: int, size: Size) -> Size:
    if width < size[0] or height < size[1]:
        raise ValueError(
            f"{name} needs {size[0]} x {size[1]} pixels (width x height) and the image has {width} x {height}: "
            f"put a resize or resize_small before it"
        )
    return width - size[0], height - size[1]
