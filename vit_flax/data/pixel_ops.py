"""Elementary operations on 8-bit Pillow images (modes RGB and L) that the augmentation policies are made of.

Pillow is the definition of each of them in timm and torchvision. The two that end in `_published` repeat what the
TensorFlow code behind AugReg and big_vision computes instead (docs/data.md says where they differ).
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Fill = tuple[int, ...]
Amount = int | float


def shear_x(image: Image.Image, factor: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return _affine(image, (1, factor, 0, 0, 1, 0), fill, resample)


def shear_y(image: Image.Image, factor: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, 0, factor, 1, 0), fill, resample)


def translate_x(image: Image.Image, pixels: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, pixels, 0, 1, 0), fill, resample)


def translate_y(image: Image.Image, pixels: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, pixels), fill, resample)


def translate_x_fraction(image: Image.Image, fraction: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return translate_x(image, fraction * image.width, fill, resample)


def translate_y_fraction(image: Image.Image, fraction: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return translate_y(image, fraction * image.height, fill, resample)


def rotate(image: Image.Image, degrees: Amount, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return image.rotate(degrees, resample=resample, fillcolor=_fill_of(image, fill))


def _affine(image: Image.Image, matrix: tuple[Amount, ...], fill: Fill, resample: Image.Resampling) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=_fill_of(image, fill)
    )


def _fill_of(image: Image.Image, fill: Fill) -> int | Fill:
    return fill if image.mode == "RGB" else round(sum(fill) / len(fill))


def autocontrast(image: Image.Image, _: Amount = 0) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, _: Amount = 0) -> Image.Image:
    return ImageOps.equalize(image)


def invert(image: Image.Image, _: Amount = 0) -> Image.Image:
    return ImageOps.invert(image)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest `bits` bits of each pixel; 0 gives a black image, 8 or more the image itself."""
    if bits >= 8:
        return image
    mask = 0xFF & ~(2 ** (8 - bits) - 1)
    return _point(image, [value & mask for value in range(256)])


def solarize(image: Image.Image, threshold: Amount) -> Image.Image:
    """Inverts the pixels at or above the threshold; 256 inverts none."""
    return _point(image, [value if value < threshold else 255 - value for value in range(256)])


def solarize_published(image: Image.Image, threshold: int) -> Image.Image:
    """The threshold wraps at 256, as in an 8-bit comparison: 256 inverts everything, 384 acts as 128."""
    return solarize(image, threshold % 256)


def solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """Brightens the pixels below 128."""
    return _point(image, [min(255, value + addition) if value < 128 else value for value in range(256)])


def _point(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def color(image: Image.Image, factor: Amount) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: Amount) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def contrast_published(image: Image.Image, factor: Amount) -> Image.Image:
    """Blends with (number of pixels) / 256 instead of the mean grey level: 196 at 224 x 224, white from 256 x 256."""
    level = min(255, int(image.width * image.height / 256))
    return Image.blend(Image.new(image.mode, image.size, (level,) * len(image.getbands())), image, factor)


def brightness(image: Image.Image, factor: Amount) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: Amount) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def hue(image: Image.Image, turn: Amount) -> Image.Image:
    """Turns the colour circle by a fraction of a full turn, -0.5 to 0.5."""
    if image.mode == "L":
        return image
    h, s, v = image.convert("HSV").split()
    shift = int(turn * 255) % 256
    return Image.merge("HSV", (h.point([(value + shift) % 256 for value in range(256)]), s, v)).convert("RGB")


def grayscale(image: Image.Image, _: Amount = 0) -> Image.Image:
    return image.convert("L").convert(image.mode)


def gaussian_blur(image: Image.Image, radius: Amount) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def cutout(image: Image.Image, half_px: int, fill: Fill, rng: np.random.Generator) -> Image.Image:
    """Paints a square of twice `half_px` around a uniform centre, clipped at the border."""
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(_fill_of(image, fill), (max(0, x - half_px), max(0, y - half_px), x + half_px, y + half_px))
    return image


# Operations that move pixels take (image, amount, fill, resample), the others (image, amount).
GEOMETRIC: dict[str, Callable] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "translate_x_fraction": translate_x_fraction,
    "translate_y_fraction": translate_y_fraction,
    "rotate": rotate,
}
POINTWISE: dict[str, Callable] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_published": solarize_published,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "contrast_published": contrast_published,
    "brightness": brightness,
    "sharpness": sharpness,
    "hue": hue,
    "grayscale": grayscale,
    "gaussian_blur": gaussian_blur,
}
