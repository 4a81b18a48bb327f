"""Host transforms: names and arguments, crops by their laws, resizes against Pillow and against their definition."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from vit_flax.data import geometry
from vit_flax.data.transforms import TRANSFORMS, make_transform

EVERY_OP = {
    "decode": {},
    "resize": {"size_px": 24},
    "resize_small": {"size_px": 24},
    "central_crop": {"size_px": 24},
    "random_crop": {"size_px": 24},
    "pad_and_crop": {"pad_px": 4},
    "inception_crop": {"size_px": 24},
    "flip": {},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "randaugment": {"spec": "rand-m9-mstd0.5-inc1"},
    "three_augment": {},
    "autoaugment_cifar": {},
}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((407, 301), Image.Resampling.BICUBIC))


def run(ops, image, seed=0):
    return make_transform(ops)({"image": image, "label": 3, "id": "a"}, np.random.default_rng(seed))["image"]


def jpeg(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([{"op": "flip"}, {"op": "inception_krop"}], r"operation 2 'inception_krop' .*did you mean 'inception_crop'"),
        ([{"op": "resize", "size": 3}], r"operation 1 'resize' does not take \['size'\].*size_px, filter='bilinear'"),
        ([{"op": "resize"}], r"operation 1 'resize' needs \['size_px'\]"),
        ([{"size_px": 3}], "operation 1 None is not known"),
        ([{"op": "resize", "size_px": 3, "filter": "cubic"}], "operation 1 'resize': filter='cubic' .*bicubic"),
        ([{"op": "resize", "size_px": 3, "filter": "bicubic", "antialias": False}], "antialias=False needs"),
        ([{"op": "flip"}, {"op": "decode"}], "operation 2 'decode' must come first"),
        ([{"op": "decode", "channels": 4}], "channels must be 1 or 3, found 4"),
        ([{"op": "decode", "codec": "turbo"}], "codec='turbo' is not known: choose one of pillow, opencv"),
        ([{"op": "decode", "oversampling": 0.5}], "oversampling must be 1 or more, found 0.5"),
        ([{"op": "inception_crop", "size_px": 3, "law": "tf"}], "law='tf' is not known.*tf_inception"),
        ([{"op": "inception_crop", "size_px": 3, "area": (0.5, 0.1)}], "area and aspect must be"),
        ([{"op": "pad_and_crop", "pad_px": 3, "mode": "wrap"}], "mode='wrap' is not known"),
        ([{"op": "pad_and_crop", "pad_px": -1}], "pad_px=-1 must be"),
        ([{"op": "pad_and_crop", "pad_px": 1, "size_px": 0}], "size_px=0 must be"),
        ([{"op": "resize", "size_px": 0}], r"operation 1 'resize': size_px=0 must be .* \(height, width\)"),
        ([{"op": "central_crop", "size_px": [3, 0]}], r"size_px=\(3, 0\) must be"),
        ([{"op": "resize_small", "size_px": -1}], "size_px=-1 must be"),
        ([{"op": "flip", "prob": 50.0}], "prob=50.0 must lie in 0..1"),
        ([{"op": "three_augment", "color_jitter": -1.0}], "amounts must be 0 or more"),
        ([{"op": "inception_crop", "size_px": 3, "area": 0.5}], r"operation 1 'inception_crop' .*type.*area=\(0.08, 1"),
        (
            [{"op": "inception_crop", "size_px": 3, "area": ()}],
            r"operation 1 'inception_crop' has an argument of the wrong",
        ),
        ([{"op": "flip", "prob": "half"}], "operation 1 'flip' has an argument of the wrong type .*found.*half"),
        (["flip"], r"operation 1 is 'flip': write it as dict\(op=NAME\)"),
    ],
)
def test_mistakes_name_the_operation_its_place_and_the_choices(ops, message):
    with pytest.raises(ValueError, match=message):
        make_transform(ops)


def test_opencv_missing_is_said_when_the_transform_is_made(monkeypatch):
    from vit_flax.data import decode

    decode.import_opencv.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ValueError, match=r"operation 1 'decode': .*pip install opencv-python-headless"):
        make_transform([{"op": "decode", "codec": "opencv"}])
    with pytest.raises(ValueError, match=r"operation 1 'resize': .*pip install opencv-python-headless"):
        make_transform([{"op": "resize", "size_px": 3, "filter": "area"}])
    decode.import_opencv.cache_clear()


def test_the_table_above_is_complete():
    assert EVERY_OP.keys() == TRANSFORMS.keys()


@pytest.mark.parametrize("name", EVERY_OP)
def test_deterministic_says_whether_the_numbers_matter(name, pixels):
    ops = [{"op": name, **EVERY_OP[name]}]
    outputs = [run(ops, pixels[:80, :90], seed) for seed in range(8)]
    all_equal = all(np.array_equal(outputs[0], other) for other in outputs[1:])
    assert make_transform(ops).deterministic == all_equal
    np.testing.assert_array_equal(outputs[0], run(ops, pixels[:80, :90], 0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", EVERY_OP)
def test_every_operation_gives_uint8_of_the_channels_and_survives_pickling(name, channels, pixels):
    head = {"op": "decode", "channels": channels}
    ops = [head] if name == "decode" else [head, {"op": name, **EVERY_OP[name]}]
    transform = pickle.loads(pickle.dumps(make_transform(ops)))
    example = {"image": jpeg(pixels), "label": 3, "id": "a"}
    out = transform(example, np.random.default_rng(0))
    assert out["image"].dtype == np.uint8
    assert out["image"].ndim == 3
    assert out["image"].shape[2] == channels
    assert (out["label"], out["id"]) == (3, "a")
    assert isinstance(example["image"], bytes)


def test_random_operations_want_a_generator(pixels):
    with pytest.raises(ValueError, match="random Generator"):
        make_transform([{"op": "flip"}])({"image": pixels, "id": "a"})
    make_transform([{"op": "resize", "size_px": 8}])({"image": pixels, "id": "a"})


def test_sizes_may_be_lists_as_json_leaves_them(pixels):
    assert run([{"op": "resize", "size_px": [20, 30]}], pixels).shape == (20, 30, 3)


@pytest.mark.parametrize("filter", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_resize_is_pillows(filter, pixels):
    expected = Image.fromarray(pixels).resize((64, 48), Image.Resampling[filter.upper()])
    np.testing.assert_array_equal(run([{"op": "resize", "size_px": (48, 64), "filter": filter}], pixels), expected)


@pytest.mark.parametrize("size", [(48, 64), (500, 600), (301, 60)])
def test_resize_without_antialias_reads_between_neighbours(size, pixels):
    """Against the definition: half-pixel centres, edges repeated, truncated to 8 bits (as tf.cast does)."""
    height, width, _ = pixels.shape
    y = np.clip((np.arange(size[0]) + 0.5) * height / size[0] - 0.5, 0, height - 1)
    x = np.clip((np.arange(size[1]) + 0.5) * width / size[1] - 0.5, 0, width - 1)
    top, left = np.minimum(y.astype(int), height - 2), np.minimum(x.astype(int), width - 2)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    image = pixels.astype(np.float64)
    rows = image[top] * (1 - down) + image[top + 1] * down
    expected = rows[:, left] * (1 - right) + rows[:, left + 1] * right
    found = run([{"op": "resize", "size_px": size, "antialias": False}], pixels).astype(float)
    assert np.abs(found - np.floor(expected)).max() <= 1
    assert np.abs(found - np.floor(expected)).mean() < 0.05


@pytest.mark.parametrize("name", ["resize", "resize_small", "inception_crop"])
@pytest.mark.parametrize(("size_px", "reduced"), [(60, True), (160, False)])  # 301 / 2 / 160 is below 1.25
def test_scaled_decoding_shows_the_same_picture(name, size_px, reduced, pixels):
    data = jpeg(pixels)
    in_full = np.asarray(Image.open(io.BytesIO(data)))
    op = {"op": name, "size_px": size_px, "filter": "bicubic"} | (
        {"area": (0.9, 1.0)} if name == "inception_crop" else {}
    )
    from_jpeg, from_pixels = run([op], data, seed=3), run([op], in_full, seed=3)
    assert from_jpeg.shape == from_pixels.shape
    difference = np.abs(from_jpeg.astype(int) - from_pixels).mean()
    assert (difference > 0) == reduced
    assert difference < 1


@pytest.mark.parametrize(("side", "size_px"), [(97, 9), (81, 8), (17, 3)])
def test_scaled_decoding_of_a_side_with_a_pixel_too_many(side, size_px):
    # 81 pixels become 11 at an eighth: nearer to a seventh of them.
    ramp = np.repeat(np.linspace(0, 255, side).astype(np.uint8)[None, :, None], 3, axis=2)
    image = np.repeat(ramp, side, axis=0)
    ops = [{"op": "resize", "size_px": size_px, "filter": "box"}]
    difference = run(ops, jpeg(image)).astype(int) - run(ops, image)
    assert np.abs(difference).max() < 255 / size_px / 3  # a third of the step between two pixels


@pytest.mark.parametrize("size_px", [60, 224, 350])
def test_area_filter_is_close_to_antialiased_bicubic(size_px, pixels):
    pytest.importorskip("cv2")
    ops = [{"op": "inception_crop", "size_px": size_px}]
    for seed in range(5):
        exact = run([{**ops[0], "filter": "bicubic"}], pixels, seed).astype(int)
        decoded = [{"op": "decode", "codec": "opencv"}, {**ops[0], "filter": "area"}, {"op": "flip", "prob": 0.0}]
        assert np.abs(run(decoded, pixels, seed) - exact).mean() < 2


@pytest.mark.parametrize(("size_px", "largest"), [((64, 400), 0.0), ((80, 50), 8.0), ((80, 300), 8.0), ((32, 50), 8.0)])
def test_area_filter_neither_blurs_a_side_that_stays_nor_skips_pixels_of_one_that_shrinks(size_px, largest):
    pytest.importorskip("cv2")
    noise = np.random.default_rng(0).integers(0, 256, (64, 400, 3), np.uint8)
    box, size = (0, 0, 400, 64), (size_px[1], size_px[0])
    exact = np.asarray(geometry.resample(Image.fromarray(noise), box, size, "bicubic", antialias=True)).astype(int)
    got = geometry.resample_area(noise, box, size)
    assert got.shape == exact.shape
    assert np.abs(got - exact).mean() <= largest


def test_flip_mirrors_arrays_of_the_area_filter(pixels):
    pytest.importorskip("cv2")
    ops = [{"op": "resize", "size_px": 40, "filter": "area"}]
    np.testing.assert_array_equal(run([*ops, {"op": "flip", "prob": 1.0}], pixels), run(ops, pixels)[:, ::-1])
    assert run([*ops, {"op": "three_augment"}], pixels).shape == (40, 40, 3)


@pytest.mark.parametrize(("shape", "expected"), [((30, 40), (24, 32)), ((40, 30), (32, 24)), ((7, 7), (24, 24))])
def test_resize_small_keeps_the_proportions(shape, expected, pixels):
    ops = [{"op": "resize_small", "size_px": 24}]
    assert run(ops, pixels[: shape[0], : shape[1]]).shape == (*expected, 3)


def test_central_crop_takes_the_middle(pixels):
    np.testing.assert_array_equal(run([{"op": "central_crop", "size_px": (5, 8)}], pixels[:10, :11]), pixels[2:7, 1:9])


@pytest.mark.parametrize("name", ["central_crop", "random_crop"])
def test_crops_larger_than_the_image_are_errors(name, pixels):
    with pytest.raises(ValueError, match=f"{name} needs 12 x 12 .* 11 x 10: put a resize"):
        run([{"op": name, "size_px": 12}], pixels[:10, :11])


def test_random_crop_reaches_every_place_equally(pixels):
    places = {pixels[top : top + 8, left : left + 9].tobytes(): 0 for top in range(3) for left in range(3)}
    transform, rng = make_transform([{"op": "random_crop", "size_px": (8, 9)}]), np.random.default_rng(0)
    for _ in range(900):
        places[transform({"image": pixels[:10, :11], "id": "a"}, rng)["image"].tobytes()] += 1
    assert len(places) == 9
    assert min(places.values()) > 60


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect"), ("edge", "edge")])
def test_pad_and_crop_cuts_from_the_padded_image(mode, numpy_mode, pixels):
    image = pixels[:10, :11]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), numpy_mode)
    windows = {padded[top : top + 10, left : left + 11].tobytes() for top in range(5) for left in range(5)}
    found = {run([{"op": "pad_and_crop", "pad_px": 2, "mode": mode}], image, seed).tobytes() for seed in range(300)}
    assert found == windows


def test_pad_and_crop_gives_the_size_asked_for(pixels):
    assert run([{"op": "pad_and_crop", "pad_px": 4, "size_px": 8, "mode": "reflect"}], pixels[:10, :11]).shape[:2] == (
        8,
        8,
    )
    with pytest.raises(ValueError, match="cannot reflect 4 px of an image of 3 x 10"):
        run([{"op": "pad_and_crop", "pad_px": 4, "mode": "reflect"}], pixels[:10, :3])


def test_flip_mirrors_half_of_the_images(pixels):
    np.testing.assert_array_equal(run([{"op": "flip", "prob": 1.0}], pixels), pixels[:, ::-1])
    np.testing.assert_array_equal(run([{"op": "flip", "prob": 0.0}], pixels), pixels)
    mirrored = [np.array_equal(run([{"op": "flip"}], pixels[:4, :4], seed), pixels[:4, 3::-1]) for seed in range(400)]
    assert 0.4 < np.mean(mirrored) < 0.6


def draw_boxes(law, width, height, area, aspect=(3 / 4, 4 / 3), count=20_000):
    rng = np.random.default_rng(0)
    return np.array([geometry.CROP_LAWS[law](width, height, area, aspect, rng) for _ in range(count)])


@pytest.mark.parametrize("law", ["area", "tf_inception"])
@pytest.mark.parametrize("size", [(500, 375), (1, 1), (3, 900), (224, 224)])
def test_boxes_stay_inside_the_image(law, size):
    left, upper, right, lower = draw_boxes(law, *size, (0.08, 1.0), count=500).T
    assert left.min() >= 0
    assert upper.min() >= 0
    assert (right > left).all()
    assert (lower > upper).all()
    assert right.max() <= size[0]
    assert lower.max() <= size[1]


def test_area_law_is_uniform_in_area_and_log_uniform_in_proportions():
    left, upper, right, lower = draw_boxes("area", 4000, 4000, (0.1, 0.4)).T  # small enough never to be refused
    area = (right - left) * (lower - upper) / 4000**2
    aspect = np.log((right - left) / (lower - upper)) / np.log(4 / 3)
    for values, low, high in ((area, 0.1, 0.4), (aspect, -1, 1)):
        deciles = np.quantile(values, np.linspace(0, 1, 11))
        np.testing.assert_allclose(deciles, np.linspace(low, high, 11), atol=0.015 * (high - low))
    np.testing.assert_allclose([left.mean(), upper.mean()], (4000 - (right - left).mean()) / 2, rtol=0.02)


def test_area_law_falls_back_to_the_largest_central_box():
    assert geometry.area_uniform_box(1000, 10, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == (
        493,
        0,
        506,
        10,
    )


# Mean height, width, top and left and the 10, 50, 90 % quantiles of the area fraction of 40,000 draws of
# tf.image.sample_distorted_bounding_box (TensorFlow 2.21, aspect_ratio_range 0.75 to 1.33, one box: the whole image).
TF_DRAWS = {
    (500, 375, 0.05): (235.24, 244.05, 69.04, 127.28, 0.082, 0.300, 0.666),
    (332, 500, 0.05): (209.13, 212.47, 144.53, 59.19, 0.079, 0.262, 0.562),
    (300, 37, 0.05): (30.24, 31.27, 2.92, 133.65, 0.054, 0.083, 0.126),
    (32, 32, 0.25): (22.70, 23.27, 4.15, 3.90, 0.281, 0.508, 0.812),
}


@pytest.mark.parametrize(("width", "height", "least"), TF_DRAWS)
def test_tf_inception_law_draws_as_tensorflow_does(width, height, least):
    left, upper, right, lower = draw_boxes("tf_inception", width, height, (least, 1.0), (0.75, 1.33), 20_000).T
    area = (right - left) * (lower - upper) / (width * height)
    means = [(lower - upper).mean(), (right - left).mean(), upper.mean(), left.mean()]
    expected = TF_DRAWS[width, height, least]
    np.testing.assert_allclose(means, expected[:4], rtol=0.02)
    np.testing.assert_allclose(np.quantile(area, [0.1, 0.5, 0.9]), expected[4:], rtol=0.03)
    assert (lower[lower - upper < height] < height).all()  # the last row is out of reach


def test_the_two_laws_differ_in_how_much_they_show():
    areas = {}
    for law in geometry.CROP_LAWS:
        left, upper, right, lower = draw_boxes(law, 500, 375, (0.08, 1.0)).T
        areas[law] = ((right - left) * (lower - upper)).mean() / (500 * 375)
    assert areas["area"] == pytest.approx(0.45, abs=0.03)
    assert areas["tf_inception"] == pytest.approx(0.37, abs=0.02)
