"""What pictures go through before a checkpoint sees them; it travels with the weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_flax.convert import resample
from vit_flax.typing import Float, UInt8

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels in [-1, 1]


@dataclass(frozen=True)
class Preprocess:
    """Resize, central crop, normalise.

    Attributes:
      image_size: rows and columns in pixels, as the model takes them.
      mean: per channel, of pixels in [0, 1].
      std: the same for the standard deviation.
      crop_fraction: the picture is resized to `image_size / crop_fraction` and the centre is cut out; None to stretch
        the whole picture to `image_size` instead.
      keep_aspect: whether the resize in front of a crop keeps the picture's proportions (the shorter side decides) or
        stretches it too.
      filter: "bilinear" or "bicubic".
      antialias: whether shrinking averages over the pixels in between (as Pillow and timm do; TensorFlow did not).
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = HALF[0]
    std: tuple[float, ...] = HALF[1]
    crop_fraction: float | None = None
    keep_aspect: bool = True
    filter: str = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        if self.filter not in ("bilinear", "bicubic"):
            raise ValueError(f"filter={self.filter!r} is unknown: expected 'bilinear' or 'bicubic'.")
        sides = self.image_size
        if not isinstance(sides, tuple) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
            raise ValueError(f"image_size={sides!r} must be two whole numbers above 0, rows and columns.")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction={self.crop_fraction!r} must be above 0 and at most 1, or None.")
        try:
            numbers = len(self.mean) == len(self.std) > 0 and np.isfinite([self.mean, self.std]).all()
        except (TypeError, ValueError):
            numbers = False
        if not numbers or min(self.std) <= 0:
            raise ValueError(f"mean={self.mean} and std={self.std} must have one number per channel, std above 0.")

    def __call__(self, image: UInt8[np.ndarray, "h w c"]) -> Float[np.ndarray, "H W c"]:
        """One picture, ready for the model.

        Raises: ValueError: the picture has another number of channels than `mean`.
        """
        if image.shape[-1] != len(self.mean):
            raise ValueError(f"The picture has {image.shape[-1]} channels, the checkpoint wants {len(self.mean)}.")
        size = self.resized(image.shape[0], image.shape[1])
        method = f"{self.filter}_antialias" if self.antialias else self.filter
        pixels = resample.resize(image, size, method)
        top, left = ((large - small) // 2 for large, small in zip(size, self.image_size, strict=True))
        pixels = pixels[top : top + self.image_size[0], left : left + self.image_size[1]]
        pixels = np.clip(np.round(pixels), 0, 255) / 255
        return ((pixels - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns after the resize, before the crop."""
        if self.crop_fraction is None:
            return self.image_size
        rows, columns = (round(side / self.crop_fraction) for side in self.image_size)
        if not self.keep_aspect:
            return rows, columns
        # The other side is rounded down, as torchvision, timm and transformers do.
        if rows * width >= columns * height:
            return rows, rows * width // height
        return columns * height // width, columns

    def with_image_size(self, image_size: tuple[int, int]) -> "Preprocess":
        """The same for a model at another image size."""
        return dataclasses.replace(self, image_size=image_size)

    def with_channels(self, channels: int) -> "Preprocess":
        """The same for another number of channels: the mean for one channel, repeated for more."""
        if channels == len(self.mean):
            return self
        mean, std = (
            (float(np.mean(values)),) if channels == 1 else tuple(values[i % len(values)] for i in range(channels))
            for values in (self.mean, self.std)
        )
        return dataclasses.replace(self, mean=mean, std=std)

    def same_as(self, other: "Preprocess") -> bool:
        """Whether both do the same to every picture; files round the size of the resize, so fractions may differ."""
        plain = [dataclasses.replace(p, crop_fraction=None) for p in (self, other)]
        return plain[0] == plain[1] and all(self.resized(*s) == other.resized(*s) for s in ((480, 640), (640, 480)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `dataclasses.asdict`, from JSON."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation pictures of a run of ours went through, exactly; `Preprocess` can say some of it only.

    Attributes:
      image_size: rows and columns in pixels, as the model got them.
      transforms: the operations of the run's `data.eval_transforms`.
      mean: per channel, of pixels in [0, 1].
      std: the same for the standard deviation.
    """

    image_size: tuple[int, int]
    transforms: tuple[Mapping[str, Any], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"the run's own evaluation transforms {[dict(op) for op in self.transforms]}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `dataclasses.asdict`, from JSON."""
        return cls(**{k: tuple(v) for k, v in values.items()})
