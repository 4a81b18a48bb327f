import numpy as np
import pytest

from vit_flax.pictures import caption, confusion, grid, to_image

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("count", "size", "channels"), [(1, (8, 8), 1), (24, (8, 8), 1), (9, (300, 200), 3)])
def test_grid_holds_every_image(count, size, channels):
    images = RNG.integers(0, 256, (count, *size, channels), np.uint8)
    sheet = grid(images, [f"a long name {i}" * 5 for i in range(count)], columns=8, tile_px=96)
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    for number in (0, count - 1):
        tile = np.asarray(to_image(images[number], 96))
        top, left = 6 + number // 8 * 120, 6 + number % 8 * 102
        np.testing.assert_array_equal(sheet[top : top + tile.shape[0], left : left + tile.shape[1]], tile)


def test_every_line_of_a_caption_is_drawn():
    images = np.full((2, 8, 8, 1), 255, np.uint8)
    one, two, other = (grid(images, [text, ""]) for text in ("70% dog", "70% dog\n30% cat", "70% dog\n20% cat"))
    np.testing.assert_array_equal(two[: len(one) - 6], one[: len(one) - 6])
    assert len(two) == len(one) + 14
    assert (two != other).any()


def test_small_images_are_enlarged_without_smoothing():
    image = np.array([[[0], [255]], [[255], [0]]], np.uint8)
    big = np.asarray(to_image(image, 4))
    np.testing.assert_array_equal(big[..., 0], np.kron(image[..., 0], np.ones((2, 2), np.uint8)))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ([0.0, 1.0, 0.0], "dog"),
        ([0.3, 0.7, 0.0], "70% dog\n30% cat"),
        ([0.002, 0.998, 0.0], "dog"),
        ([1.0, 0.0, 1.0], "cat, elk"),
        ([0.0, 0.0, 0.0], ""),
    ],
)
def test_caption(target, text):
    assert caption(np.array(target), ["cat", "dog", "elk"]) == text


def test_names_that_the_font_lacks():
    names = ["caf\u00e9", "\u732b", "dog"]
    assert [caption(target, names) for target in np.eye(3)] == ["cafe", "class 1", "dog"]
    plain = confusion(np.eye(3), ["cafe", "class 1", "dog"])
    np.testing.assert_array_equal(confusion(np.eye(3), names), plain)


@pytest.mark.parametrize("count", [2, 10, 40, 100])
def test_confusion_shades_rows_by_their_sums(count):
    matrix = np.eye(count, dtype=int) * 9
    matrix[0, 1] = 9
    picture = confusion(matrix, [f"class {i} with a very long name\nand a line" for i in range(count)])
    assert picture.shape[0] <= 1000
    blue = (picture == (31, 92, 178)).all(-1).sum(), (picture == (192, 57, 43)).all(-1).sum()
    assert blue[0] > 0  # a class that is always right
    assert blue[1] == 0  # no class that is always wrong
    matrix[0] = 0
    matrix[0, 1] = 1
    wrong = confusion(matrix, ["x"] * count)
    assert (wrong == (192, 57, 43)).all(-1).any()


def test_class_without_examples():
    assert confusion(np.zeros((3, 3), int), ["a", "b", "漢字"]).dtype == np.uint8
