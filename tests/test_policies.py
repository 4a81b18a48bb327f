"""Augmentation policies: each operation against its definition in numpy, each policy against its published table."""

import collections

import numpy as np
import pytest
from PIL import Image

from vit_flax.data import pixel_ops, policies

FILL = (10, 20, 30)
NEAREST = Image.Resampling.NEAREST


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((45, 40), Image.Resampling.BICUBIC))


def point(name, pixels, *amount) -> np.ndarray:
    return np.asarray(pixel_ops.POINTWISE[name](Image.fromarray(pixels), *amount)).astype(int)


def luma(pixels) -> np.ndarray:
    """ITU-R 601 in 16-bit fixed point, rounded."""
    return (pixels.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16


def blend(base, pixels, factor) -> np.ndarray:
    return np.clip(base + factor * (pixels.astype(float) - base), 0, 255).astype(int)


def test_invert(pixels):
    np.testing.assert_array_equal(point("invert", pixels), 255 - pixels.astype(int))


@pytest.mark.parametrize("bits", [0, 1, 4, 7, 8, 12])
def test_posterize(bits, pixels):
    drop = max(0, 8 - bits)
    np.testing.assert_array_equal(point("posterize", pixels, bits), pixels.astype(int) >> drop << drop)


@pytest.mark.parametrize("threshold", [0, 26, 128, 256])
def test_solarize(threshold, pixels):
    expected = np.where(pixels < threshold, pixels, 255 - pixels.astype(int))
    np.testing.assert_array_equal(point("solarize", pixels, threshold), expected)


@pytest.mark.parametrize(("threshold", "acts_as"), [(100, 100), (256, 0), (384, 128), (512, 0)])
def test_published_solarize_wraps_at_256(threshold, acts_as, pixels):
    np.testing.assert_array_equal(point("solarize_published", pixels, threshold), point("solarize", pixels, acts_as))


def test_solarize_add(pixels):
    expected = np.where(pixels < 128, np.minimum(pixels.astype(int) + 99, 255), pixels)
    np.testing.assert_array_equal(point("solarize_add", pixels, 99), expected)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.9, 2.8])
def test_enhancers_blend_with_their_base(factor, pixels):
    grey = luma(pixels)
    mean = int(grey.mean() + 0.5)
    for name, base in (("brightness", 0), ("contrast", mean), ("color", grey[..., None])):
        np.testing.assert_allclose(point(name, pixels, factor), blend(base, pixels, factor), atol=1)


@pytest.mark.parametrize(("size", "level"), [(224, 196), (32, 4), (300, 255)])
def test_published_contrast_blends_with_the_number_of_pixels(size, level):
    image = np.full((size, size, 3), 50, np.uint8)
    np.testing.assert_allclose(point("contrast_published", image, 0.5), blend(level, image, 0.5), atol=1)


def test_sharpness_blends_with_a_smoothed_image_and_leaves_the_border(pixels):
    padded = pixels.astype(float)
    weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = padded.copy()
    smooth[1:-1, 1:-1] = sum(weights[i, j] * padded[i : i + 38, j : j + 43] for i in range(3) for j in range(3))
    np.testing.assert_allclose(point("sharpness", pixels, 0.3), blend(np.round(smooth), pixels, 0.3), atol=1)


def test_autocontrast_stretches_each_channel(pixels):
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    np.testing.assert_allclose(point("autocontrast", pixels), (pixels - low) * 255 / (high - low), atol=1)


def test_equalize_flattens_each_histogram(pixels):
    found = point("equalize", pixels)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = np.minimum((step // 2 + np.cumsum(counts) - counts) // step, 255)
        np.testing.assert_array_equal(found[..., channel], table[pixels[..., channel]])


def test_grayscale_and_hue(pixels):
    np.testing.assert_array_equal(point("grayscale", pixels), np.repeat(luma(pixels)[..., None], 3, 2))
    np.testing.assert_allclose(point("hue", pixels, 0.0), pixels, atol=8)  # there and back through 8-bit HSV
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    np.testing.assert_allclose(point("hue", red, 1 / 3)[0, 0], (0, 255, 0), atol=4)
    np.testing.assert_allclose(point("hue", red, -1 / 3)[0, 0], (0, 0, 255), atol=8)


def test_blur_keeps_the_mean_and_smooths(pixels):
    blurred = point("gaussian_blur", pixels, 2.0)
    assert abs(blurred.mean() - pixels.mean()) < 1
    assert np.abs(np.diff(blurred, axis=1)).mean() < 0.7 * np.abs(np.diff(pixels.astype(int), axis=1)).mean()


def move(name, pixels, amount, resample=NEAREST) -> np.ndarray:
    return np.asarray(pixel_ops.GEOMETRIC[name](Image.fromarray(pixels), amount, FILL, resample))


def test_translations_shift_and_fill(pixels):
    right = move("translate_x", pixels, -7)  # positive amounts move the picture to the left
    np.testing.assert_array_equal(right[:, 7:], pixels[:, :-7])
    np.testing.assert_array_equal(right[:, :7], np.broadcast_to(FILL, (40, 7, 3)))
    np.testing.assert_array_equal(move("translate_y", pixels, 5)[:-5], pixels[5:])
    np.testing.assert_array_equal(move("translate_x_fraction", pixels, 0.2), move("translate_x", pixels, 9))
    np.testing.assert_array_equal(move("translate_y_fraction", pixels, 0.2), move("translate_y", pixels, 8))


@pytest.mark.parametrize("factor", [0.3, -0.3])
def test_shears_move_each_row_by_its_height(factor, pixels):
    found = move("shear_x", pixels, factor)
    for row in range(40):
        columns = np.floor(np.arange(45) + 0.5 + factor * (row + 0.5)).astype(int)
        inside = (columns >= 0) & (columns < 45)
        expected = np.where(inside[:, None], pixels[row, columns.clip(0, 44)], FILL)
        np.testing.assert_array_equal(found[row], expected)
    turned = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(move("shear_y", turned, factor), found.transpose(1, 0, 2))


def test_rotation_is_counterclockwise(pixels):
    np.testing.assert_array_equal(move("rotate", pixels[:, :40], 90), np.rot90(pixels[:, :40]))


def test_cutout_paints_a_clipped_square(pixels):
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        image = Image.fromarray(pixels)
        painted = (np.asarray(pixel_ops.cutout(image, 6, FILL, rng)) == FILL).all(-1)
        rows, columns = painted.any(1).nonzero()[0], painted.any(0).nonzero()[0]
        assert painted.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        areas.append(painted.sum())
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert max(areas) == 144
    assert min(areas) < 100


@pytest.fixture
def applied(monkeypatch):
    """Records what a policy does instead of doing it: (name, amount, fill, filter)."""
    record = []

    def note(name, image, amount, fill, filter, rng):
        record.append((name, amount, fill, filter))
        return image

    monkeypatch.setattr(policies, "_apply", note)
    return record


def amounts_of(record) -> dict[str, set]:
    found = collections.defaultdict(set)
    for name, amount, *_ in record:
        found[name].add(round(float(amount), 6))
    return found


def repeat(policy, times=3000):
    rng, image = np.random.default_rng(0), Image.new("RGB", (8, 8))
    for _ in range(times):
        policy(image, rng)


ENHANCERS = ("color", "contrast", "brightness", "sharpness")
FREE = {"autocontrast": {0}, "equalize": {0}, "invert": {0}}
MOVES_9 = {
    "rotate": {-27, 27},
    "shear_x": {-0.27, 0.27},
    "shear_y": {-0.27, 0.27},
    "translate_x_fraction": {-0.405, 0.405},
    "translate_y_fraction": {-0.405, 0.405},
    "solarize_add": {99},
}


def test_timm_randaugment_has_the_published_amounts(applied):
    """timm/data/auto_augment.py at magnitude 9: 15 operations, half of them skipped."""
    repeat(policies.RandAugment("rand-m9"))
    enhanced = {name: {1.72} for name in ENHANCERS}
    assert amounts_of(applied) == FREE | MOVES_9 | enhanced | {"posterize": {3}, "solarize": {230}}
    assert 2800 < len(applied) < 3200  # two draws, each applied with probability one half
    counts = collections.Counter(name for name, *_ in applied)
    assert min(counts.values()) > 140
    assert {entry[2:] for entry in applied} == {((124, 116, 104), "random")}


def test_timm_increasing_randaugment_has_the_published_amounts(applied):
    repeat(policies.RandAugment("rand-m9-inc1-n3-p1.0", filter="bicubic", fill=FILL))
    enhanced = {name: {0.19, 1.81} for name in ENHANCERS}
    assert amounts_of(applied) == FREE | MOVES_9 | enhanced | {"posterize": {1}, "solarize": {26}}
    assert len(applied) == 9000
    assert {entry[2:] for entry in applied} == {(FILL, "bicubic")}


def test_timm_magnitude_noise_is_normal_and_clipped(applied):
    repeat(policies.RandAugment("rand-m9-mstd0.5-inc1"), times=20_000)
    degrees = np.abs([amount for name, amount, *_ in applied if name == "rotate"])
    levels = degrees / 3
    assert levels.max() == 10  # normal(9, 0.5) clipped to 10
    assert np.mean(levels == 10) == pytest.approx(0.0228, abs=0.012)
    assert np.median(levels) == pytest.approx(9, abs=0.05)
    assert np.quantile(levels, 0.1587) == pytest.approx(8.5, abs=0.07)
    applied.clear()
    repeat(policies.RandAugment("rand-m8-mstd101"), times=20_000)
    levels = np.abs([amount for name, amount, *_ in applied if name == "rotate"]) / 3
    np.testing.assert_allclose(np.quantile(levels, [0, 0.25, 0.5, 0.75, 1]), [0, 2, 4, 6, 8], atol=0.3)
    applied.clear()
    repeat(policies.RandAugment("rand-m15-mmax20"))
    assert amounts_of(applied)["rotate"] == {-45, 45}


@pytest.mark.parametrize("variant", ["fixed", "published"])
def test_augreg_randaugment_has_the_published_amounts(variant, applied):
    """big_vision/pp/autoaugment.py:distort_image_with_randaugment at (2, 15): 16 operations, always applied."""
    repeat(policies.RandAugment("randaug(2,15)", variant=variant))
    expected = FREE | {
        "rotate": {-45, 45},
        "shear_x": {-0.45, 0.45},
        "shear_y": {-0.45, 0.45},
        "translate_x": {-150, 150},
        "translate_y": {-150, 150},
        "color": {2.8},
        "brightness": {2.8},
        "sharpness": {2.8},
        "posterize": {6},
        "solarize_add": {165},
        "cutout": {60},
    }
    expected |= (
        {"contrast": {2.8}, "solarize": {0}}
        if variant == "fixed"
        else {
            "contrast_published": {2.8},
            "solarize_published": {384},
        }
    )
    assert amounts_of(applied) == expected
    assert len(expected) == 16
    assert len(applied) == 6000
    assert {entry[2:] for entry in applied} == {((128, 128, 128), "nearest")}


@pytest.mark.parametrize("spec", ["rand-m9-x1", "rand-m", "randaug(2)", "rand-w0", "augmix", "rand-m9-mstd", ""])
def test_misspelt_randaugment_is_an_error_that_shows_the_spelling(spec):
    with pytest.raises(ValueError, match=r"is not a RandAugment: write 'randaug\(2,15\)'.*rand-m9-mstd0.5-inc1"):
        policies.RandAugment(spec)


def test_randaugment_refuses_unknown_choices():
    with pytest.raises(ValueError, match="variant='exact' is not known"):
        policies.RandAugment("randaug(2,15)", variant="exact")
    with pytest.raises(ValueError, match="variant='published' exists for randaug"):
        policies.RandAugment("rand-m9", variant="published")
    with pytest.raises(ValueError, match="filter='lanczos' is not known"):
        policies.RandAugment("rand-m9", filter="lanczos")


def test_autoaugment_cifar_has_25_sub_policies_of_the_published_amounts(applied):
    assert len(policies.CIFAR_POLICY) == 25
    repeat(policies.AutoAugmentCifar(), times=8000)
    found = amounts_of(applied)
    assert found["translate_y_fraction"] == {round(s * 150 / 331 * level / 9, 6) for s in (-1, 1) for level in (3, 9)}
    assert found["brightness"] == {round(1 + s * level / 10, 6) for s in (-1, 1) for level in (3, 6, 7, 9)}
    assert found["posterize"] == {5}
    assert found["rotate"] == {-6.666667, 6.666667}
    assert found["solarize"] == {round(255 - 255 * level / 9, 6) for level in (2, 3, 5, 8)}
    # Of the two operations of a sub-policy each comes with its own probability; "invert" 0.1, 0.0 and 0.1 in three.
    counts = collections.Counter(name for name, *_ in applied)
    assert counts["invert"] / 8000 == pytest.approx(0.2 / 25, abs=0.004)
    assert counts["rotate"] / 8000 == pytest.approx(0.7 / 25, abs=0.006)


def test_three_augment_does_exactly_one_of_three(pixels):
    image, rng = Image.fromarray(pixels), np.random.default_rng(0)
    counts = collections.Counter()
    for _ in range(600):
        out = np.asarray(policies.ThreeAugment(color_jitter=0.0)(image, rng)).astype(int)
        if np.array_equal(out, point("grayscale", pixels)):
            counts["grey"] += 1
        elif np.array_equal(out, point("solarize", pixels, 128)):
            counts["solarize"] += 1
        else:
            assert abs(out.mean() - pixels.mean()) < 2
            counts["blur"] += 1
    assert set(counts) == {"grey", "solarize", "blur"}
    assert min(counts.values()) > 150
    jittered = [np.asarray(policies.ThreeAugment()(image, np.random.default_rng(seed))).mean() for seed in range(20)]
    assert np.std(jittered) > 10


def test_color_jitter_draws_factors_and_order(monkeypatch):
    record = []
    for name in ("brightness", "contrast", "color", "hue"):
        monkeypatch.setitem(
            pixel_ops.POINTWISE, name, lambda image, amount, name=name: record.append((name, amount)) or image
        )
    repeat(policies.ColorJitter(brightness=0.4, contrast=1.5, saturation=0.0, hue=0.1), times=2000)
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.0, 2.5), ("hue", -0.1, 0.1)):
        values = [amount for n, amount in record if n == name]
        assert len(values) == 2000
        np.testing.assert_allclose(np.quantile(values, [0, 0.5, 1]), [low, (low + high) / 2, high], atol=0.1)
    assert {name for name, _ in record} == {"brightness", "contrast", "hue"}
    orders = {tuple(name for name, _ in record[i : i + 3]) for i in range(0, 6000, 3)}
    assert len(orders) == 6


def test_color_jitter_refuses_impossible_amounts():
    with pytest.raises(ValueError, match=r"hue at most 0\.5"):
        policies.ColorJitter(hue=0.7)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("spec", ["rand-m9-mstd0.5-inc1", "randaug(2,20)", "randaug(2,0)"])
def test_randaugment_works_on_colour_and_grey(mode, spec, pixels):
    image, rng = Image.fromarray(pixels).convert(mode), np.random.default_rng(0)
    for variant in ("fixed", "published") if spec.startswith("randaug") else ("fixed",):
        outputs = [policies.RandAugment(spec, variant=variant)(image, rng) for _ in range(150)]
        assert {(out.mode, out.size) for out in outputs} == {(mode, image.size)}
        assert len({out.tobytes() for out in outputs}) > 20
