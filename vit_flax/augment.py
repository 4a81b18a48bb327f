"""Augmentation of a whole batch, inside jit: uint8 images in, normalised images out.

    shift / rotate small images -> flip -> normalise -> random erasing -> mixup or cutmix

Every rate is a Python number or a traced scalar. A Python 0 (or None) leaves the operation out of the program; a traced
0 is computed and changes nothing, so that one program can serve every member of a sweep.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.typing import Array, Bool, Float, Key, Shaped, UInt8

MIX_MODES = ("batch", "pair", "elem")
MIX_PARTNERS = ("roll", "reverse")
ERASE_FILLS = ("mean", "colour", "noise")
PAD_MODES = {"zero": "constant", "reflect": "reflect", "edge": "edge"}

# One stream of random numbers per operation: switching one on leaves the numbers of the others as they were.
_AFFINE, _CROP, _FLIP, _ERASE, _MIX = range(5)


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    targets: Float[Array, "b v"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    affine: Mapping[str, Any] | None = None,
    pad_crop_px: int = 0,
    pad_mode: str = "zero",
    flip: bool = False,
    mixup_alpha: Any = 0.0,
    cutmix_alpha: Any = 0.0,
    switch_prob: Any = 0.5,
    mix_prob: Any = 1.0,
    mix_mode: str = "batch",
    mix_partner: str = "roll",
    erase_prob: Any = 0.0,
    erase_area: tuple[float, float] = (0.02, 1 / 3),
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3),
    erase_fill: str = "mean",
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b v"]]:
    """Augments and normalises one training batch.

    Args:
      key: randomness of this step; `fold_in(key, step)` makes a resumed run repeat it.
      images: pixels 0..255.
      targets: one-hot or multi-label targets.
      mean: mean of the pixels in units of 0..1, one number or one per channel.
      std: the same for the standard deviation.
      affine: arguments of `random_affine`, meant for small images; None leaves it out.
      pad_crop_px: pads every side by so many pixels and crops at random back to the size.
      pad_mode: what is padded: "zero", "reflect" or "edge".
      flip: mirrors half of the images left to right.
      mixup_alpha: Beta(alpha, alpha) of mixup; 0 is off.
      cutmix_alpha: Beta(alpha, alpha) of cutmix; 0 is off.
      switch_prob: probability of cutmix, the rest is mixup, where both are on.
      mix_prob: probability that a batch (pair, element) is mixed at all.
      mix_mode: "batch" draws once per batch, "pair" once per pair (i, b-1-i), "elem" once per image.
      mix_partner: "roll" mixes image i with i-1, "reverse" with b-1-i ("pair" needs it).
      erase_prob: probability that a rectangle of an image is erased; 0 is off.
      erase_area: least and largest area of that rectangle as a fraction of the image.
      erase_aspect: least and largest height / width of it, drawn log-uniformly.
      erase_fill: "mean" (zeros after normalising), "colour" (one normal draw per channel) or "noise" (one per pixel;
        the images of a batch share the noise picture, each sees it through its own rectangle).
      dtype: dtype of the images returned. The arithmetic is float32.
    Returns: the images, and the targets mixed in the same proportion.
    Raises: ValueError: an unknown choice, or a mean or std that does not fit the channels.
    Source: mixup arXiv:1710.09412; cutmix arXiv:1905.04899; random erasing arXiv:1708.04896; the modes and the order of
      the operations are timm's (data/mixup.py, data/random_erasing.py).
    """
    _check_choice("mix_mode", mix_mode, MIX_MODES)
    _check_choice("mix_partner", mix_partner, MIX_PARTNERS)
    if affine is not None and not all(_absent(amount) for amount in affine.values()):
        images = random_affine(jax.random.fold_in(key, _AFFINE), images, **affine)
    if pad_crop_px:
        images = random_shift(jax.random.fold_in(key, _CROP), images, pad_crop_px, pad_mode)
    if flip:
        images = random_flip(jax.random.fold_in(key, _FLIP), images)
    x = normalize(images, mean=mean, std=std)
    if not _absent(erase_prob):
        x = random_erase(jax.random.fold_in(key, _ERASE), x, erase_prob, erase_area, erase_aspect, erase_fill)
    if not ((_absent(mixup_alpha) and _absent(cutmix_alpha)) or _absent(mix_prob)):
        keep = mix_weights(
            jax.random.fold_in(key, _MIX),
            x.shape[:3],
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            switch_prob=switch_prob,
            mix_prob=mix_prob,
            mode=mix_mode,
        )
        x, targets = mix(x, targets, keep, "reverse" if mix_mode == "pair" else mix_partner)
    return x.astype(dtype), targets


def normalize(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b h w c"]:
    """Maps pixels 0..255 to (pixel / 255 - mean) / std, computed in float32.

    Args:
      images: pixels in units of 0..255.
      mean: in units of 0..1, one number or one per channel.
      std: the same.
    Raises: ValueError: the numbers do not fit the channels, or a std is not positive.
    """
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name} has {len(values)} numbers for images of {channels} channels: give 1 or {channels}"
            )
    if min(std) <= 0:
        raise ValueError(f"std must be positive, found {tuple(std)}")
    scale = np.broadcast_to(1 / (255 * np.asarray(std, np.float64)), (1, 1, 1, channels)).astype(np.float32)
    shift = np.broadcast_to(np.asarray(mean, np.float64) / np.asarray(std, np.float64), (1, 1, 1, channels))
    return images.astype(jnp.float32) * scale - shift.astype(np.float32)


def random_affine(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    *,
    rotate_degrees: Any = 0.0,
    scale_percent: Any = 0.0,
    translate_px: Any = 0.0,
    shear_degrees: Any = 0.0,
) -> Float[Array, "b h w c"]:
    """Rotates, scales, shears and shifts each image by its own amounts, bilinearly, about its centre.

    Every amount is uniform in [-value, value]; what comes from outside the image is black. The gather costs four reads
    a pixel: right for images of some 8 to 64 pixels, for large ones crop on the host.

    Args:
      key: randomness.
      images: pixels 0..255.
      rotate_degrees: largest rotation.
      scale_percent: largest change of size; 10 draws from 0.9 to 1.1.
      translate_px: largest shift along each axis; fractions of a pixel are drawn too.
      shear_degrees: largest shear, horizontal.
    Returns: pixels 0..255, not rounded.
    """
    batch, height, width, channels = images.shape
    draws = jax.random.uniform(key, (5, batch), minval=-1.0, maxval=1.0)
    angle = draws[0] * (_scalar(rotate_degrees) * (np.pi / 180))
    shear = jnp.tan(draws[1] * (_scalar(shear_degrees) * (np.pi / 180)))
    zoom = 1 / (1 + draws[2] * (_scalar(scale_percent) / 100))
    shift = draws[3:] * _scalar(translate_px)

    # From the pixel wanted back to where it comes from: unshift, rotate back, unshear, unzoom, all about the centre.
    rows, columns = np.indices((height, width), np.float32).reshape(2, 1, -1)
    rows, columns = rows - np.float32((height - 1) / 2), columns - np.float32((width - 1) / 2)
    y, x = rows - shift[0][:, None], columns - shift[1][:, None]
    cos, sin = (jnp.cos(angle) * zoom)[:, None], (jnp.sin(angle) * zoom)[:, None]
    y, x = cos * y - sin * x, sin * y + cos * x
    x = x - shear[:, None] * y
    pixels = _bilinear(images.astype(jnp.float32), y + (height - 1) / 2, x + (width - 1) / 2)
    return pixels.reshape(batch, height, width, channels)


def random_shift(
    key: Key[Array, ""], images: Shaped[Array, "b h w c"], pad_px: int, pad_mode: str = "zero"
) -> Shaped[Array, "b h w c"]:
    """Pads every side by `pad_px` and crops each image at its own random place: the pad-and-crop of CIFAR recipes."""
    _check_choice("pad_mode", pad_mode, tuple(PAD_MODES))
    batch, height, width, channels = images.shape
    border = ((0, 0), (pad_px, pad_px), (pad_px, pad_px), (0, 0))
    padded = jnp.pad(images, border, mode=PAD_MODES[pad_mode])
    corners = jax.random.randint(key, (batch, 2), 0, 2 * pad_px + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: Key[Array, ""], images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Mirrors each image left to right with probability one half."""
    mirrored = _drawn_once(jax.random.bernoulli(key, 0.5, (images.shape[0],)))[:, None, None, None]
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_erase(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    prob: Any,
    area: tuple[float, float],
    aspect: tuple[float, float],
    fill: str,
) -> Float[Array, "b h w c"]:
    """Fills one random rectangle of some of the images; arguments as the `erase_*` of `augment`."""
    _check_choice("erase_fill", fill, ERASE_FILLS)
    batch, height, width, channels = images.shape
    chosen_key, box_key, fill_key = jax.random.split(key, 3)
    chosen = jax.random.uniform(chosen_key, (batch,)) < _scalar(prob)

    # Ten tries, the first rectangle that fits counts; where none fits the image stays whole, as in the published code.
    tries = 10
    u = jax.random.uniform(box_key, (4 * batch * tries,)).reshape(4, batch, tries)  # drawn flat: compiles faster
    pixels = (area[0] + u[0] * (area[1] - area[0])) * (height * width)
    ratio = jnp.exp(np.log(aspect[0]) + u[1] * (np.log(aspect[1]) - np.log(aspect[0])))
    tall, wide = jnp.round(jnp.sqrt(pixels * ratio)), jnp.round(jnp.sqrt(pixels / ratio))
    fits = (tall < height) & (wide < width)
    top, left = jnp.floor(u[2] * (height - tall + 1)), jnp.floor(u[3] * (width - wide + 1))
    first = jnp.argmax(fits, axis=1, keepdims=True)
    top, left, tall, wide = (jnp.take_along_axis(v, first, axis=1)[:, 0] for v in (top, left, tall, wide))
    shape = {"mean": (1, 1, 1, 1), "colour": (batch, 1, 1, channels), "noise": (1, height, width, channels)}[fill]
    noise = jax.random.normal(fill_key, (math.prod(shape),)).reshape(shape)
    content = jnp.zeros(shape) if fill == "mean" else noise
    drawn = _drawn_once((chosen & fits.any(axis=1), top, left, tall, wide, content))
    chosen, top, left, tall, wide, content = drawn
    erased = _box(top, left, tall, wide, height, width) & chosen[:, None, None]
    return jnp.where(erased[..., None], content, images)


def mix_weights(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    *,
    mixup_alpha: Any,
    cutmix_alpha: Any,
    switch_prob: Any,
    mix_prob: Any,
    mode: str,
) -> Float[Array, "#b h w"]:
    """Draws how much of each pixel stays: the same everywhere for mixup, 0 in a rectangle for cutmix."""
    batch, height, width = shape
    if mode == "pair":
        batch = (batch + 1) // 2
    n = 1 if mode == "batch" else batch
    mixup_key, cutmix_key, box_key, switch_key, prob_key = jax.random.split(key, 5)
    keep = cut = jnp.ones((n, height, width))
    if not _absent(mixup_alpha):
        stays = symmetric_beta(mixup_key, _scalar(mixup_alpha), (n,))
        keep = jnp.broadcast_to(stays[:, None, None], (n, height, width))
    if not _absent(cutmix_alpha):
        stays = symmetric_beta(cutmix_key, _scalar(cutmix_alpha), (n,))
        cut = 1.0 - _cut_box(box_key, stays, height, width)
        # A traced 0 switches its operation off, so the other one takes every draw.
        prob = jnp.where(_scalar(cutmix_alpha) > 0, _scalar(switch_prob), 0.0)
        prob = jnp.where(_scalar(mixup_alpha) > 0, prob, 1.0)
        keep = jnp.where((jax.random.uniform(switch_key, (n,)) < prob)[:, None, None], cut, keep)
    if not (isinstance(mix_prob, int | float) and mix_prob == 1):
        mixed = jax.random.uniform(prob_key, (n,)) < _scalar(mix_prob)
        keep = jnp.where(mixed[:, None, None], keep, 1.0)
    if mode == "pair":
        keep = jnp.concatenate([keep, keep[: shape[0] // 2][::-1]])
    return keep


def mix(
    images: Float[Array, "b h w c"], targets: Float[Array, "b v"], keep: Float[Array, "#b h w"], partner: str
) -> tuple[Float[Array, "b h w c"], Float[Array, "b v"]]:
    """Mixes images and targets with their partners by the weights of `mix_weights`."""

    def other(values):
        return jnp.roll(values, 1, axis=0) if partner == "roll" else values[::-1]

    # The share of the pixels that stay, which after clipping a rectangle at the border is not the number drawn.
    share = keep.mean(axis=(1, 2))[:, None].astype(targets.dtype)
    weights = _drawn_once(keep)[..., None]
    return weights * images + (1 - weights) * other(images), share * targets + (1 - share) * other(targets)


def symmetric_beta(key: Key[Array, ""], alpha: Float[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws from Beta(alpha, alpha) in closed form; alpha = 0 gives 1.

    `jax.random.beta` is a rejection loop that takes seconds to compile. A Student-t variate with 2 alpha degrees of
    freedom has the polar form sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v), and 1/2 + t / (2 sqrt(2 alpha + t^2)) is
    Beta(alpha, alpha); written with q = u^(1/alpha) nothing overflows.

    Source: Bailey 1994, Mathematics of Computation 62, 779-781; Devroye 1996, "Random variate generation in one line of
      code". Exact for every alpha > 0.
    """
    u, v = jax.random.uniform(key, (2, *shape), minval=np.finfo(np.float32).tiny)
    q = u ** (1 / jnp.where(alpha > 0, alpha, 1.0))
    cos = jnp.cos(2 * np.pi * v)
    top = (1 - q) * cos**2
    ratio = jnp.sqrt(top / jnp.maximum(q + top, np.finfo(np.float32).tiny))
    return jnp.where(alpha > 0, 0.5 + 0.5 * jnp.sign(cos) * ratio, 1.0)


def _cut_box(key, stays: Float[Array, "b"], height: int, width: int) -> Float[Array, "b h w"]:
    """1 inside a rectangle of about (1 - stays) of the image around a uniform centre, clipped at the border."""
    side = jnp.sqrt(1 - stays)
    centre = jax.random.uniform(key, (2, stays.shape[0]))
    half = [jnp.floor(jnp.floor(length * side) / 2) for length in (height, width)]
    middle = [jnp.floor(c * length) for c, length in zip(centre, (height, width))]
    top, left = middle[0] - half[0], middle[1] - half[1]
    return _box(top, left, 2 * half[0], 2 * half[1], height, width).astype(jnp.float32)


def _box(top, left, tall, wide, height: int, width: int) -> Bool[Array, "b h w"]:
    rows, columns = np.arange(height, dtype=np.float32)[None, :], np.arange(width, dtype=np.float32)[None, :]
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def _bilinear(images: Float[Array, "b h w c"], y: Float[Array, "b n"], x: Float[Array, "b n"]) -> Float[Array, "b n c"]:
    """Reads the images at fractional positions in pixels; beyond the border they are black."""
    batch, height, width, channels = images.shape
    # A black frame of one pixel: positions are clipped onto it, so that no read needs a mask.
    framed = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(batch, -1, channels)
    y, x = jnp.clip(y + 1, 0, height + 1), jnp.clip(x + 1, 0, width + 1)
    row = jnp.minimum(jnp.floor(y).astype(jnp.int32), height)
    column = jnp.minimum(jnp.floor(x).astype(jnp.int32), width)
    down, right = (y - row.astype(y.dtype))[..., None], (x - column.astype(x.dtype))[..., None]
    corner = row * (width + 2) + column

    def read(offset):
        return jnp.take_along_axis(framed, (corner + offset)[..., None], axis=1, mode="promise_in_bounds")

    upper = (1 - right) * read(0) + right * read(1)
    lower = (1 - right) * read(width + 2) + right * read(width + 3)
    return (1 - down) * upper + down * lower


def _drawn_once(values):
    """Keeps XLA from fusing random numbers into the loops over pixels, where they would be drawn for every pixel."""
    return jax.lax.optimization_barrier(values)


def _absent(value: Any) -> bool:
    """Whether the operation is left out of the program: None or a Python 0, never a traced number."""
    return value is None or (isinstance(value, int | float) and value == 0)


def _scalar(value: Any) -> Float[Array, ""]:
    return jnp.asarray(0.0 if value is None else value, jnp.float32)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(map(repr, choices))}")
