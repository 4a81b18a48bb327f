"""Augmentation inside jit: what is off is absent, what is on does what its paper says, on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from vit_flax.augment import (
    augment,
    mix_weights,
    normalize,
    random_affine,
    random_erase,
    random_flip,
    random_shift,
    symmetric_beta,
)
from vit_flax.sharding import batch_sharding, make_mesh

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AFFINE = {"rotate_degrees": 15.0, "scale_percent": 15.0, "translate_px": 1.5, "shear_degrees": 5.0}
eager = partial(augment, mean=(0.0,), std=(1 / 255,))  # pixels keep their values


def plain(key, images, targets, **settings):
    return jax.jit(partial(eager, **settings))(key, images, targets)


def batch(b=16, h=12, w=10, c=3, v=16, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (b, h, w, c), np.uint8)
    return jnp.asarray(images), jnp.eye(v, dtype=jnp.float32)[jnp.arange(b) % v]


@partial(jax.jit, static_argnames=("names",))
def run(key, images, targets, values, names):
    return eager(key, images, targets, **dict(zip(names, values)))


def close(x, y, atol=1e-3):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol)


# --- normalising ---


def test_normalize_is_the_published_formula():
    images, _ = batch()
    found = normalize(images, mean=MEAN, std=STD)
    expected = (np.asarray(images) / 255 - np.array(MEAN)) / np.array(STD)
    assert found.dtype == jnp.float32
    close(found, expected, 1e-5)


def test_one_number_serves_all_channels():
    images, _ = batch()
    close(normalize(images, mean=(0.5,), std=(0.25,)), (np.asarray(images) / 255 - 0.5) / 0.25, 1e-5)


def test_normalize_refuses_numbers_that_do_not_fit():
    images, _ = batch()
    with pytest.raises(ValueError, match="mean has 2 numbers for images of 3 channels: give 1 or 3"):
        normalize(images, mean=(0.5, 0.5), std=(0.5,))
    with pytest.raises(ValueError, match="std must be positive"):
        normalize(images, mean=(0.5,), std=(0.0,))


# --- off ---

OFF = {
    "affine": {"rotate_degrees": 0.0, "scale_percent": 0, "translate_px": 0.0},
    "pad_crop_px": 0,
    "flip": False,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0,
    "erase_prob": None,
}
ON = {
    "affine": AFFINE,
    "pad_crop_px": 2,
    "flip": True,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "erase_prob": 0.5,
}


def program(**settings) -> str:
    images, targets = batch()
    return str(jax.make_jaxpr(partial(eager, **settings))(jax.random.key(0), images, targets))


def test_what_is_off_is_not_in_the_program():
    text = program(**OFF)
    for primitive in ("random", "select", "gather", "sort", "pad", "dynamic_slice", "concatenate"):
        assert primitive not in text
    assert text == program()


@pytest.mark.parametrize("name", ON)
def test_what_is_on_is_in_the_program(name):
    assert "random_bits" in program(**OFF | {name: ON[name]})


def test_traced_zeros_change_nothing_for_any_member():
    images, targets = batch()

    def member(key, rates):
        amounts = dict.fromkeys(AFFINE, rates[2])
        return eager(
            key, images, targets, affine=amounts, mixup_alpha=rates[0], cutmix_alpha=rates[1], erase_prob=rates[2]
        )

    rates = jnp.zeros((2, 3)).at[1].set(jnp.array([0.5, 0.5, 0.7]))
    x, y = jax.jit(jax.vmap(member))(jax.random.split(jax.random.key(0), 2), rates)
    close(x[0], images)
    close(y[0], targets)
    assert np.abs(np.asarray(x[1]) - np.asarray(images)).mean() > 10
    assert np.abs(np.asarray(y[1]) - np.asarray(targets)).mean() > 0.001


@pytest.mark.parametrize("zero", ["mixup_alpha", "cutmix_alpha"])
def test_a_traced_zero_leaves_every_draw_to_the_other(zero):
    """With one of the two at zero the other acts on every batch, as if it alone were configured."""
    images, targets = batch()
    names = ("mixup_alpha", "cutmix_alpha")
    values = [0.0 if name == zero else 1.0 for name in names]
    mixed = 0
    for seed in range(12):
        x, y = run(jax.random.key(seed), images, targets, jnp.array(values), names)
        share = float(y[0, 0])
        mixed += 0 < share < 1
        if zero == "cutmix_alpha":
            close(x, share * np.asarray(images) + (1 - share) * partner_of(images, "roll"), 0.05)
        else:
            assert np.isin(np.asarray(x), np.arange(256)).all()  # whole pixels of one or the other
    assert mixed >= 10


# --- mixing ---


def shares(y, partner="roll") -> np.ndarray:
    """How much of each image its targets say is left (targets are one-hot and all different)."""
    return np.asarray(y)[np.arange(len(y)), np.arange(len(y))]


def partner_of(images, partner):
    return np.roll(np.asarray(images), 1, 0) if partner == "roll" else np.asarray(images)[::-1]


@pytest.mark.parametrize("partner", ["roll", "reverse"])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_mixes_images_and_targets_alike(mode, partner):
    if mode == "pair" and partner == "roll":
        partner = "reverse"  # pairs are (i, b-1-i) whatever the partner
    images, targets = batch()
    x, y = plain(jax.random.key(3), images, targets, mixup_alpha=1.0, mix_mode=mode, mix_partner=partner)
    share = shares(y)
    weights = share[:, None, None, None]
    close(x, weights * np.asarray(images) + (1 - weights) * partner_of(images, partner), 0.01)
    close(y, share[:, None] * np.asarray(targets) + (1 - share[:, None]) * partner_of(targets, partner), 1e-6)
    close(np.asarray(y).sum(1), 1.0, 1e-6)
    distinct = {"batch": 1, "pair": 8, "elem": 16}[mode]
    assert len(np.unique(share.round(5))) == distinct
    if mode == "pair":
        close(share, share[::-1], 1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_cutmix_pastes_one_rectangle_and_counts_its_pixels(mode):
    images, targets = batch(h=20, w=24)
    x, y = plain(jax.random.key(5), images, targets, cutmix_alpha=1.0, mix_mode=mode)
    other = partner_of(images, "reverse" if mode == "pair" else "roll")
    kept, pasted = (np.isclose(np.asarray(x), source).all(-1) for source in (np.asarray(images), other))
    assert (kept | pasted).all()
    for i in range(16):
        rows, columns = pasted[i].any(1).nonzero()[0], pasted[i].any(0).nonzero()[0]
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else 0
        assert pasted[i].sum() == area
        assert shares(y)[i] == pytest.approx(1 - area / (20 * 24), abs=1e-6)
    boxes = {pasted[i].tobytes() for i in range(16)}
    assert len(boxes) == 1 if mode == "batch" else len(boxes) > 5


def test_an_odd_batch_leaves_the_middle_of_the_pairs_alone():
    images, targets = batch(b=5)
    x, _ = plain(jax.random.key(1), images, targets, mixup_alpha=1.0, mix_mode="pair")
    close(x[2], images[2])


def test_cutmix_areas_follow_the_beta_distribution():
    """The box before clipping has the area 1 - lambda, lambda uniform for alpha = 1."""
    keep = mix_weights(
        jax.random.key(0), (1500, 64, 64), mixup_alpha=0, cutmix_alpha=1.0, switch_prob=0.5, mix_prob=1, mode="elem"
    )
    area = 1 - np.asarray(keep).mean((1, 2))
    assert area.max() > 0.7
    # By integration over a uniform centre and a uniform area the part inside the image has this mean.
    side = np.sqrt(np.linspace(0, 1, 2001))
    centre = np.linspace(0, 1, 401)[:, None]
    inside = np.clip(centre + side / 2, 0, 1) - np.clip(centre - side / 2, 0, 1)
    assert area.mean() == pytest.approx((inside.mean(0) ** 2).mean(), abs=0.025)


@pytest.mark.parametrize(("prob", "cut"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_switch_prob_is_the_share_of_cutmix(prob, cut):
    keep = mix_weights(
        jax.random.key(0), (1000, 8, 8), mixup_alpha=5.0, cutmix_alpha=1.0, switch_prob=prob, mix_prob=1, mode="elem"
    )
    whole = np.isin(np.asarray(keep), (0.0, 1.0)).all((1, 2))
    assert whole.mean() == pytest.approx(cut, abs=0.05)


@pytest.mark.parametrize("prob", [0.0, 0.4, 1.0])
def test_mix_prob_is_the_share_that_is_mixed(prob):
    images, targets = batch(b=400, h=2, w=2, v=400)
    _, y = plain(jax.random.key(0), images, targets, mixup_alpha=1.0, mix_prob=prob, mix_mode="elem")
    assert np.mean(shares(y) < 1) == pytest.approx(prob, abs=0.08)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_symmetric_beta_is_beta(alpha):
    draws = np.asarray(symmetric_beta(jax.random.key(0), jnp.float32(alpha), (40_000,)))
    # Below 1e-7 float32 has no numbers next to 1, hence the clipping.
    inside = draws[(draws > 1e-6) & (draws < 1 - 1e-6)]
    mass = np.diff(scipy.stats.beta(alpha, alpha).cdf([1e-6, 1 - 1e-6]))[0]
    assert len(inside) / 40_000 == pytest.approx(mass, abs=0.01)
    grid = np.linspace(0.01, 0.99, 50)
    expected = scipy.stats.beta(alpha, alpha).cdf(grid)
    np.testing.assert_allclose([(draws <= g).mean() for g in grid], expected, atol=0.012)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e3])
def test_symmetric_beta_survives_extremes(alpha):
    draws = np.asarray(symmetric_beta(jax.random.key(0), jnp.float32(alpha), (1000,)))
    assert np.isfinite(draws).all()
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert draws.mean() == pytest.approx(0.5, abs=0.05)
    assert draws.std() == pytest.approx(np.sqrt(1 / (4 * (2 * alpha + 1))), rel=0.1)


# --- erasing ---


@pytest.mark.parametrize("fill", ["mean", "colour", "noise"])
def test_erasing_fills_one_rectangle_of_some_images(fill):
    x = jnp.full((600, 24, 24, 3), 7.0)
    out = np.asarray(random_erase(jax.random.key(0), x, 0.3, (0.02, 1 / 3), (0.3, 1 / 0.3), fill))
    erased = (out != 7).all(-1)
    assert erased.any((1, 2)).mean() == pytest.approx(0.3, abs=0.06)
    areas = []
    for image, mask in zip(out, erased):
        if mask.any():
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert mask.sum() == height * width
            areas.append(height * width / 24**2)
            content = image[mask]
            assert (content == 0).all() if fill == "mean" else (content != 0).any()
            assert (len(np.unique(content, axis=0)) == 1) == (fill != "noise")
    assert 0.01 < min(areas) < 0.04
    assert 0.30 < max(areas) < 0.36
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.025)
    if fill != "mean":
        values = out[erased]
        assert abs(values.mean()) < 0.2
        assert values.std() == pytest.approx(1, abs=0.1)


def test_erasing_probability_one_erases_all():
    out = random_erase(jax.random.key(0), jnp.full((64, 16, 16, 1), 7.0), 1.0, (0.02, 1 / 3), (0.3, 1 / 0.3), "mean")
    assert (np.asarray(out) == 0).any((1, 2, 3)).all()


def test_erasing_comes_before_mixing_as_in_timm():
    images, targets = batch(b=64, v=64)
    settings = {"erase_prob": 1.0, "cutmix_alpha": 1.0, "mix_mode": "elem"}
    both, _ = plain(jax.random.key(2), images, targets, **settings)
    erased, _ = plain(jax.random.key(2), images, targets, erase_prob=1.0)
    sources = np.stack([np.asarray(erased), partner_of(erased, "roll")])
    assert np.isclose(np.asarray(both), sources).any(0).all()


# --- geometry ---


def test_flip_mirrors_half_of_the_images():
    images, _ = batch(b=400, h=3, w=4)
    out = np.asarray(random_flip(jax.random.key(0), images))
    mirrored = (out == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    same = (out == np.asarray(images)).all((1, 2, 3))
    assert (mirrored | same).all()
    assert mirrored.mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect"), ("edge", "edge")])
def test_shift_cuts_every_window_of_the_padded_image(mode, numpy_mode):
    images, _ = batch(b=400, h=6, w=5)
    out = np.asarray(random_shift(jax.random.key(0), images, 2, mode))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), numpy_mode)
    places = np.zeros((5, 5), int)
    for i in range(400):
        windows = np.lib.stride_tricks.sliding_window_view(padded[i], (6, 5), axis=(0, 1))
        hits = (windows == out[i].transpose(2, 0, 1)).all((2, 3, 4))
        assert hits.any()
        places += hits
    assert places.min() > 4


def test_affine_is_scipys_with_the_same_numbers():
    images, _ = batch(b=8, h=9, w=7)
    key = jax.random.key(4)
    found = np.asarray(random_affine(key, images, **AFFINE))
    draws = np.asarray(jax.random.uniform(key, (5, 8), minval=-1.0, maxval=1.0), np.float64)
    angle, shear = np.deg2rad(draws[0] * 15), np.tan(np.deg2rad(draws[1] * 5))
    for i in range(8):
        rotate = np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        unshear = np.array([[1.0, 0.0], [-shear[i], 1.0]])
        back = unshear @ rotate / (1 + 0.15 * draws[2, i])
        centre = np.array([4.0, 3.0])
        offset = centre - back @ (centre + 1.5 * draws[3:, i])
        for channel in range(3):
            image = np.asarray(images[i, :, :, channel], np.float64)
            expected = scipy.ndimage.affine_transform(image, back, offset, order=1, mode="grid-constant")
            np.testing.assert_allclose(found[i, :, :, channel], expected, atol=0.05)


def test_affine_draws_each_image_its_own_amounts_in_their_range():
    """A bright dot off the centre: its centre of mass tells rotation, scale and shift."""
    dot = np.zeros((300, 41, 41, 1), np.uint8)
    dot[:, 18:23, 30:35] = 255
    grid = np.arange(41) - 20

    def position(**amounts):
        out = np.asarray(random_affine(jax.random.key(0), jnp.asarray(dot), **amounts))[..., 0]
        total = out.sum((1, 2))
        return (out * grid[:, None]).sum((1, 2)) / total, (out * grid[None]).sum((1, 2)) / total

    y, x = position(rotate_degrees=30.0)
    angles = np.rad2deg(np.arctan2(y, x))
    np.testing.assert_allclose(np.hypot(x, y), 12, atol=0.1)
    np.testing.assert_allclose(np.quantile(angles, [0, 0.5, 1]), [-30, 0, 30], atol=4)
    _, x = position(scale_percent=20.0)
    np.testing.assert_allclose(np.quantile(x / 12, [0, 0.5, 1]), [0.8, 1, 1.2], atol=0.03)
    y, x = position(translate_px=3.0)
    np.testing.assert_allclose(np.quantile(y, [0, 0.5, 1]), [-3, 0, 3], atol=0.4)
    np.testing.assert_allclose(np.quantile(x, [0, 0.5, 1]), [9, 12, 15], atol=0.4)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.2


# --- the whole ---

EVERYTHING = {**ON, "erase_fill": "noise", "mix_mode": "elem"}


def test_same_key_same_batch_other_key_other_batch():
    images, targets = batch()
    step = jax.jit(partial(eager, **EVERYTHING))
    first, again, other = (step(jax.random.key(seed), images, targets)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(other)).mean() > 10


def test_switching_one_operation_on_leaves_the_numbers_of_the_others():
    images, targets = batch()
    _, alone = plain(jax.random.key(0), images, targets, mixup_alpha=1.0)
    _, among = plain(jax.random.key(0), images, targets, mixup_alpha=1.0, flip=True, pad_crop_px=2, erase_prob=0.5)
    np.testing.assert_array_equal(alone, among)


def test_bfloat16_is_float32_rounded_once():
    images, targets = batch()
    exact, y32 = plain(jax.random.key(0), images, targets, **EVERYTHING)
    rounded, y16 = plain(jax.random.key(0), images, targets, dtype=jnp.bfloat16, **EVERYTHING)
    assert rounded.dtype == jnp.bfloat16
    assert y16.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(y16, y32)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_a_batch_on_eight_devices_is_the_batch_on_one(mode):
    images, targets = batch()
    spread = batch_sharding(make_mesh())
    assert spread.num_devices == 8
    step = jax.jit(partial(eager, **EVERYTHING | {"mix_mode": mode}))
    x, y = step(jax.random.key(0), images, targets)
    xs, ys = step(jax.random.key(0), jax.device_put(images, spread), jax.device_put(targets, spread))
    assert xs.sharding.is_equivalent_to(spread, 4)
    close(xs, x, 1e-3)
    close(ys, y, 1e-5)


def test_mixing_with_the_neighbour_sends_single_images_between_devices():
    images, targets = batch()
    spread = batch_sharding(make_mesh())
    placed = jax.device_put(images, spread), jax.device_put(targets, spread)
    for partner in ("roll", "reverse"):
        step = jax.jit(partial(eager, mixup_alpha=1.0, mix_partner=partner))
        text = step.lower(jax.random.key(0), *placed).compile().as_text()
        assert "collective-permute" in text
        assert "all-gather" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix_mode": "image"}, "mix_mode='image' is not known: choose one of 'batch', 'pair', 'elem'"),
        ({"mix_partner": "random"}, "mix_partner='random' is not known: choose one of 'roll', 'reverse'"),
        ({"erase_prob": 0.5, "erase_fill": "black"}, "erase_fill='black' is not known"),
        ({"pad_crop_px": 1, "pad_mode": "wrap"}, "pad_mode='wrap' is not known"),
    ],
)
def test_unknown_choices_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        eager(jax.random.key(0), *batch(), **settings)
