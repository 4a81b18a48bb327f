"""Augmentation policies: RandAugment, AutoAugment for CIFAR, 3-Augment and colour jitter, on Pillow images.

Each is a frozen dataclass with its arguments as fields, called with an image and a random generator. The published
policies differ in small ways that move results; a policy names the code it follows.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from PIL import Image

from vit_flax.data import pixel_ops

_RESAMPLE = {
    "nearest": (Image.Resampling.NEAREST,),
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}
_GREY = (128, 128, 128)
_IMAGENET_MEAN = (124, 116, 104)  # 255 x (0.485, 0.456, 0.406)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies a few operations drawn at random, all at one magnitude (arXiv:1909.13719).

    Two families, told apart by the spelling of `spec`:

    - "rand-m9-mstd0.5-inc1", timm's (DeiT, MAE fine-tuning). Parts: m magnitude 0..10 (10), n operations (2), mstd
      standard deviation of the magnitude (0; above 100: uniform in 0..m), mmax upper bound of the magnitude (10), inc 1
      for operations that all grow with the magnitude (0), p probability of each operation (0.5).
    - "randaug(2,15)", AugReg's and big_vision's: 2 operations out of 16 at magnitude 15, always applied.

    Attributes:
      spec: one of the two spellings.
      variant: for randaug(n,m) only: "fixed", or "published" to repeat the contrast and solarize of the original code.
      filter: "nearest", "bilinear", "bicubic", or "random" between the last two; None is the family's own, "random" for
        timm's (its recipes often say bicubic) and "nearest" for AugReg's.
      fill: colour of what comes into view; None is the family's own, the ImageNet mean for timm's, 128 for AugReg's.
    """

    spec: str
    variant: str = "fixed"
    filter: str | None = None
    fill: tuple[int, ...] | None = None
    random: ClassVar[bool] = True

    def __post_init__(self):
        plan = parse_randaugment(self.spec, self.variant)
        _check_filter(self.filter or plan.filter)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        plan = parse_randaugment(self.spec, self.variant)
        names = list(plan.ops)
        for index in rng.integers(len(names), size=plan.num_ops):
            if plan.prob < 1 and rng.random() >= plan.prob:
                continue
            amount = plan.ops[names[index]](plan.draw_level(rng), rng)
            image = _apply(names[index], image, amount, self.fill or plan.fill, self.filter or plan.filter, rng)
        return image


@dataclasses.dataclass(frozen=True)
class RandAugmentPlan:
    """What a RandAugment string means.

    Attributes:
      ops: operation name -> amount(level, rng).
      num_ops: operations per image, drawn with replacement.
      level: magnitude; 10 is the full range of an operation.
      level_std: standard deviation of a normal magnitude, or infinity for a uniform one in 0..level.
      level_max: the magnitude drawn is clipped to 0..level_max.
      prob: probability that a drawn operation is applied.
      filter: a key of `_RESAMPLE`.
      fill: colour of what comes into view.
    """

    ops: dict[str, Callable]
    num_ops: int
    level: float
    level_std: float = 0.0
    level_max: float = 10.0
    prob: float = 1.0
    filter: str = "nearest"
    fill: tuple[int, ...] = _GREY

    def draw_level(self, rng: np.random.Generator) -> float:
        level = self.level
        if self.level_std == float("inf"):
            level = rng.uniform(0, level)
        elif self.level_std > 0:
            level = rng.normal(level, self.level_std)
        return min(max(level, 0.0), self.level_max)


@functools.cache
def parse_randaugment(spec: str, variant: str = "fixed") -> RandAugmentPlan:
    """Reads "rand-m9-mstd0.5-inc1" or "randaug(2,15)"; see `RandAugment`.

    Raises: ValueError: neither spelling, an unknown part, or an unknown variant.
    """
    augreg = re.fullmatch(r"randaug\((\d+), ?(\d+)\)", spec)
    if augreg:
        if variant not in ("fixed", "published"):
            raise ValueError(f"variant={variant!r} is not known: choose 'fixed' or 'published'")
        level = float(augreg[2])
        ops = AUGREG_OPS if variant == "fixed" else AUGREG_PUBLISHED_OPS
        return RandAugmentPlan(ops=ops, num_ops=int(augreg[1]), level=level, level_max=float("inf"))
    name, *parts = spec.split("-")
    matches = [_TIMM_PART.fullmatch(part) for part in parts]
    if name != "rand" or None in matches:
        raise ValueError(
            f"{spec!r} is not a RandAugment: write 'randaug(2,15)', or 'rand' with any of m9, n2, mstd0.5, mmax10, "
            f"inc1, p0.5 after it, such as 'rand-m9-mstd0.5-inc1'"
        )
    if variant != "fixed":
        raise ValueError(f"variant={variant!r} exists for randaug(n,m) only")
    values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "mmax": 10.0, "inc": 0.0, "p": 0.5} | {
        match[1]: float(match[2]) for match in matches if match
    }
    return RandAugmentPlan(
        ops=TIMM_INCREASING_OPS if values["inc"] else TIMM_OPS,
        num_ops=int(values["n"]),
        level=values["m"],
        level_std=float("inf") if values["mstd"] > 100 else values["mstd"],
        level_max=values["mmax"],
        prob=values["p"],
        filter="random",
        fill=_IMAGENET_MEAN,
    )


_TIMM_PART = re.compile(r"(m|n|mstd|mmax|inc|p)(\d+(?:\.\d+)?)")


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


# Amount of an operation at a level; 10 is the full range (timm/data/auto_augment.py; big_vision/pp/autoaugment.py).
_NO_AMOUNT: dict[str, Callable] = dict.fromkeys(("autocontrast", "equalize", "invert"), lambda level, rng: 0)
_MOVES: dict[str, Callable] = {
    "rotate": lambda level, rng: _signed(3 * level, rng),
    "shear_x": lambda level, rng: _signed(0.03 * level, rng),
    "shear_y": lambda level, rng: _signed(0.03 * level, rng),
}
_ENHANCERS = ("color", "contrast", "brightness", "sharpness")
TIMM_OPS: dict[str, Callable] = {
    **_NO_AMOUNT,
    **_MOVES,
    **dict.fromkeys(
        ("translate_x_fraction", "translate_y_fraction"), lambda level, rng: _signed(level / 10 * 0.45, rng)
    ),
    **dict.fromkeys(_ENHANCERS, lambda level, rng: 0.18 * level + 0.1),
    "posterize": lambda level, rng: int(level / 10 * 4),
    "solarize": lambda level, rng: min(256, int(level / 10 * 256)),
    "solarize_add": lambda level, rng: min(128, int(level / 10 * 110)),
}
TIMM_INCREASING_OPS: dict[str, Callable] = {
    **TIMM_OPS,
    **dict.fromkeys(_ENHANCERS, lambda level, rng: max(0.1, 1 + _signed(0.09 * level, rng))),
    "posterize": lambda level, rng: 4 - int(level / 10 * 4),
    "solarize": lambda level, rng: 256 - min(256, int(level / 10 * 256)),
}
_AUGREG_SHARED: dict[str, Callable] = {
    **_NO_AMOUNT,
    **_MOVES,
    **dict.fromkeys(("translate_x", "translate_y"), lambda level, rng: _signed(10 * level, rng)),
    **dict.fromkeys(("color", "brightness", "sharpness"), lambda level, rng: 0.18 * level + 0.1),
    "posterize": lambda level, rng: int(level / 10 * 4),
    "solarize_add": lambda level, rng: int(level / 10 * 110),
    "cutout": lambda level, rng: int(level / 10 * 40),
}
AUGREG_OPS: dict[str, Callable] = {
    **_AUGREG_SHARED,
    "contrast": lambda level, rng: 0.18 * level + 0.1,
    "solarize": lambda level, rng: max(0, 256 - int(level / 10 * 256)),
}
AUGREG_PUBLISHED_OPS: dict[str, Callable] = {
    **_AUGREG_SHARED,
    "contrast_published": lambda level, rng: 0.18 * level + 0.1,
    "solarize_published": lambda level, rng: int(level / 10 * 256),
}


@dataclasses.dataclass(frozen=True)
class AutoAugmentCifar:
    """Applies one of the 25 sub-policies that AutoAugment found on CIFAR-10 (arXiv:1805.09501, table 7).

    Attributes:
      filter: "nearest", "bilinear", "bicubic" or "random" between the last two.
      fill: colour of what comes into view.
    """

    filter: str = "nearest"
    fill: tuple[int, ...] = _GREY
    random: ClassVar[bool] = True

    def __post_init__(self):
        _check_filter(self.filter)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for name, prob, level in CIFAR_POLICY[rng.integers(len(CIFAR_POLICY))]:
            if rng.random() < prob:
                amount = CIFAR_OPS[name](level, rng)
                image = _apply(name, image, amount, self.fill, self.filter, rng)
        return image


# Ten levels 0..9 over the ranges of the paper's table 6; the enhancers go both ways from 1.
CIFAR_OPS: dict[str, Callable] = {
    **_NO_AMOUNT,
    **dict.fromkeys(("shear_x", "shear_y"), lambda level, rng: _signed(0.3 * level / 9, rng)),
    **dict.fromkeys(
        ("translate_x_fraction", "translate_y_fraction"), lambda level, rng: _signed(150 / 331 * level / 9, rng)
    ),
    **dict.fromkeys(_ENHANCERS, lambda level, rng: 1 + _signed(0.9 * level / 9, rng)),
    "rotate": lambda level, rng: _signed(30 * level / 9, rng),
    "posterize": lambda level, rng: 8 - round(4 * level / 9),
    "solarize": lambda level, rng: 255 - 255 * level / 9,
}
CIFAR_POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x_fraction", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y_fraction", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x_fraction", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y_fraction", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y_fraction", 0.9, 9), ("translate_y_fraction", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y_fraction", 0.7, 9), ("autocontrast", 0.9, 1)),
)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue by random factors, in random order, as torchvision does.

    Attributes:
      brightness: the factor is uniform in [max(0, 1 - value), 1 + value]; 0 leaves it out.
      contrast: the same.
      saturation: the same.
      hue: the turn of the colour circle is uniform in [-value, value], at most 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    random: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.hue <= 0.5 or min(self.brightness, self.contrast, self.saturation) < 0:
            raise ValueError(f"amounts must be 0 or more and hue at most 0.5, found {self}")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        amounts = {"brightness": self.brightness, "contrast": self.contrast, "color": self.saturation}
        draws = {name: rng.uniform(max(0.0, 1 - v), 1 + v) for name, v in amounts.items() if v > 0}
        if self.hue > 0:
            draws["hue"] = rng.uniform(-self.hue, self.hue)
        names = list(draws)
        for index in rng.permutation(len(names)):
            image = pixel_ops.POINTWISE[names[index]](image, draws[names[index]])
        return image


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
    """DeiT III's 3-Augment: exactly one of grey, solarize and blur, then colour jitter (arXiv:2204.07118).

    Attributes:
      color_jitter: brightness, contrast and saturation of the jitter; 0 leaves it out.
    """

    color_jitter: float = 0.3
    random: ClassVar[bool] = True

    def __post_init__(self):
        ColorJitter(self.color_jitter)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        name = ("grayscale", "solarize", "gaussian_blur")[rng.integers(3)]
        amount = {"grayscale": 0, "solarize": 128, "gaussian_blur": rng.uniform(0.1, 2.0)}[name]
        image = pixel_ops.POINTWISE[name](image, amount)
        return ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)(image, rng)


def _check_filter(name: str) -> None:
    if name not in _RESAMPLE:
        raise ValueError(f"filter={name!r} is not known: choose one of {', '.join(_RESAMPLE)}")


def _apply(name: str, image: Image.Image, amount, fill, filter: str, rng: np.random.Generator) -> Image.Image:
    if name == "cutout":
        return pixel_ops.cutout(image, amount, fill, rng)
    if name in pixel_ops.GEOMETRIC:
        choices = _RESAMPLE[filter]
        resample = choices[rng.integers(len(choices))] if len(choices) > 1 else choices[0]
        return pixel_ops.GEOMETRIC[name](image, amount, fill, resample)
    return pixel_ops.POINTWISE[name](image, amount)
