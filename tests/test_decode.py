"""Every kind of file that a folder of pictures may hold: the right pixels, or an error that names the file."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_flax.data.decode import DecodeError, open_picture

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 100, 50]]], np.uint8)


def encode(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def decode(data, channels=3, **options) -> np.ndarray:
    return np.asarray(open_picture(data, "pictures/a.jpg", channels=channels, **options).load())


def photograph(width=96, height=64, seed=0) -> Image.Image:
    """Smooth colours with some detail, as JPEG likes them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_give_their_pixels(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(Image.fromarray(COLOURS), format, **options)), COLOURS)


def test_jpeg_gives_its_pixels():
    image = photograph()
    assert np.abs(decode(encode(image, "JPEG", quality=95)).astype(int) - np.asarray(image)).mean() < 2


def test_grey_jpeg_becomes_three_equal_channels():
    grey = photograph().convert("L")
    pixels = decode(encode(grey, "JPEG", quality=95))
    assert pixels.shape == (64, 96, 3)
    np.testing.assert_array_equal(pixels[:, :, 0], pixels[:, :, 2])
    assert np.abs(pixels[:, :, 0].astype(int) - np.asarray(grey)).mean() < 2


def test_one_channel_is_luma():
    luma = COLOURS.astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decode(encode(Image.fromarray(COLOURS), "PNG"), channels=1), luma, atol=1)


def test_cmyk_jpeg_has_the_colours_of_the_original():
    image = photograph()
    pixels = decode(encode(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 4


def test_palette_gives_colours_and_not_indices():
    palette = Image.fromarray(COLOURS).quantize(colors=4)
    np.testing.assert_array_equal(decode(encode(palette, "PNG")), COLOURS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_dropped(mode):
    source = Image.fromarray(COLOURS if mode == "RGBA" else np.array([[10, 200], [90, 0]], np.uint8))
    with_alpha = source.convert("P" if mode == "PA" else mode)
    if mode == "PA":
        data = encode(with_alpha, "PNG", transparency=0)
    else:
        with_alpha.putalpha(Image.fromarray(np.array([[0, 255], [128, 1]], np.uint8)))
        data = encode(with_alpha, "PNG")
    np.testing.assert_array_equal(decode(data), np.asarray(source.convert("RGB")))


def test_sixteen_bit_grey_keeps_the_high_byte():
    values = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    pixels = decode(encode(Image.fromarray(values), "PNG"), channels=1)
    np.testing.assert_array_equal(pixels, values >> 8)


def test_netpbm_has_sixteen_bits_too():
    pixels = decode(b"P5\n2 1\n65535\n" + np.array([0x1234, 0xFF00], ">u2").tobytes(), channels=1)
    np.testing.assert_array_equal(pixels, [[0x12, 0xFF]])


def test_a_palette_with_transparent_colours():
    # Pillow warns of such files, and the tests take warnings for errors.
    palette = Image.fromarray(COLOURS).quantize(colors=4)
    np.testing.assert_array_equal(decode(encode(palette, "PNG", transparency=bytes([0, 9, 99, 255]))), COLOURS)


def test_bilevel_becomes_black_and_white():
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decode(encode(image, "PNG"), channels=1), [[0, 255], [255, 0]])


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    np.testing.assert_array_equal(decode(data), np.asarray(frames[0]))


def test_one_pixel():
    np.testing.assert_array_equal(decode(encode(Image.fromarray(COLOURS[:1, :1]), "PNG")), COLOURS[:1, :1])


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])  # Pillow turns TIFFs itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.asarray(Image.open(io.BytesIO(encode(photograph(), format, quality=95))))
    data = encode(photograph(), format, exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data), upright)
    assert open_picture(data, "a").size == (upright.shape[1], upright.shape[0])
    np.testing.assert_array_equal(decode(data, apply_exif=False), stored)
    assert open_picture(data, "a", apply_exif=False).size == (stored.shape[1], stored.shape[0])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty"),
        (b"GIF89a", "."),
        (b"<html>not found</html>", "not an image .22 bytes"),
        (encode(photograph(), "JPEG")[:-300], "truncated"),
        (encode(photograph(), "JPEG")[:200], "."),
        (encode(photograph(), "PNG")[:-300], "truncated"),
        (encode(photograph(), "PNG")[:60] + b"?" + encode(photograph(), "PNG")[61:], "."),
        (encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(np.full((2, 2), 200, np.int32)), "TIFF"), "32-bit pixels"),
        (np.zeros((4, 4, 3), np.float32), "float32 .4, 4, 3."),
        (np.zeros((4, 4, 2), np.uint8), "uint8 .4, 4, 2."),
    ],
)
def test_bad_data_is_an_error_with_the_name_and_the_problem(data, problem):
    with pytest.raises(DecodeError, match=problem) as caught:
        decode(data)
    assert "'pictures/a.jpg'" in str(caught.value)
    assert caught.value.record_id == "pictures/a.jpg"
    copy = pickle.loads(pickle.dumps(caught.value))  # on its way out of a worker process
    assert (type(copy), str(copy)) == (DecodeError, str(caught.value))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
def test_arrays_pass_through(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = decode(pixels, channels=1 if len(shape) == 2 or shape[2] == 1 else 3)
    np.testing.assert_array_equal(found.reshape(shape), pixels)


@pytest.mark.parametrize(
    ("shrink", "oversampling", "size"),
    [
        (1.0, 1.0, (101, 67)),
        (1.9, 1.0, (101, 67)),
        (2.0, 1.0, (51, 34)),
        (5.0, 1.0, (26, 17)),
        (3.9, 2.0, (101, 67)),
        (4.0, 2.0, (51, 34)),
        (99.0, 2.0, (13, 9)),
        (99.0, np.inf, (101, 67)),
    ],
)
def test_jpeg_is_decoded_at_a_fraction_but_never_too_small(shrink, oversampling, size):
    data = encode(photograph(101, 67), "JPEG", quality=95)
    assert open_picture(data, "a", oversampling=oversampling).load(shrink).size == size


def test_only_jpeg_is_decoded_at_a_fraction():
    assert open_picture(encode(photograph(), "PNG"), "a").load(16.0).size == (96, 64)


@pytest.mark.parametrize("shrink", [1.0, 4.0, 16.0])
def test_opencv_decodes_the_same_pixels(shrink):
    pytest.importorskip("cv2")
    data = encode(photograph(200, 120), "JPEG", quality=90)
    pillow, opencv = (open_picture(data, "a", codec=codec).load_pixels(shrink) for codec in ("pillow", "opencv"))
    np.testing.assert_array_equal(opencv, pillow)


def test_opencv_leaves_what_it_reads_differently_to_pillow():
    pytest.importorskip("cv2")
    cmyk = encode(photograph().convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(decode(cmyk, codec="opencv"), decode(cmyk))
    with pytest.raises(DecodeError, match="truncated"):
        decode(encode(photograph(), "JPEG")[:-300], codec="opencv")
