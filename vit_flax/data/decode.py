"""Image bytes to pixels: one function for every file a collection of pictures may hold, and an error that names it.

Pillow decodes. The header is read first (`open_picture`), the pixels when a transform knows how many of them it needs
(`Picture.load`): a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, which the format does almost for free.
"""

import dataclasses
import functools
import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}
CODECS = ("pillow", "opencv")
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> the operation that makes the picture upright (EXIF 2.32, table 6).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """A record whose image cannot be turned into pixels.

    Attributes:
      record_id: the `id` of the example: a path, or what the source calls the record.
      problem: what is wrong with it.
    """

    def __init__(self, record_id: str, problem: str):
        super().__init__(record_id, problem)
        self.record_id = record_id
        self.problem = problem

    def __str__(self) -> str:
        return f"cannot decode {self.record_id!r}: {self.problem}"


@dataclasses.dataclass
class Picture:
    """An image whose header has been read and whose pixels have not.

    Attributes:
      image: what Pillow opened.
      record_id: named in errors.
      mode: "RGB" or "L", the mode that `load` returns.
      upright: the operation that undoes the EXIF orientation, None for none.
      codec: "pillow", or "opencv" for the JPEGs it decodes to the same pixels.
      data: the encoded bytes, none for an array.
      oversampling: see `load`.
    """

    image: Image.Image
    record_id: str
    mode: str
    upright: Image.Transpose | None
    codec: str = "pillow"
    data: bytes = b""
    oversampling: float = 1.25

    @property
    def size(self) -> tuple[int, int]:
        """Width and height after `load()`, in pixels."""
        width, height = self.image.size
        return (height, width) if self.upright in _SWAPS_SIDES else (width, height)

    def load(self, shrink: float = 1.0) -> Image.Image:
        """Decodes the pixels to a Pillow image.

        Args:
          shrink: how much smaller the pixels will be made afterwards. A JPEG is then decoded at 1/1, 1/2, 1/4 or 1/8,
            the smallest that leaves `oversampling` times the resolution needed; everything else comes at full size.
        Raises: DecodeError: the data ends early or is damaged, or the pixels have no meaning as 8-bit colours.
        """
        if self._opencv_can():
            return Image.fromarray(self.load_pixels(shrink))
        return self._load_pillow(shrink)

    def load_pixels(self, shrink: float = 1.0) -> np.ndarray:
        """Decodes the pixels to uint8 [h, w] or [h, w, 3]; arguments and errors as `load`."""
        if self._opencv_can():
            cv2 = import_opencv()
            reduced = {
                1: 0,
                2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
                4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
                8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
            }
            flags = reduced[self.reduction(shrink)] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(self.data, np.uint8), flags)
            if pixels is not None:
                return pixels
        return np.asarray(self._load_pillow(shrink))  # Pillow's message says what is wrong with the file

    def reduction(self, shrink: float) -> int:
        """How much smaller a JPEG is decoded; see `load`."""
        return max((factor for factor in (2, 4, 8) if factor * self.oversampling <= shrink), default=1)

    def _opencv_can(self) -> bool:
        """Colour JPEGs only: OpenCV decodes them faster, and the rest differently."""
        return (
            self.codec == "opencv"
            and self.image.format == "JPEG"
            and self.image.mode == self.mode == "RGB"
            and self.upright is None
        )

    def _load_pillow(self, shrink: float) -> Image.Image:
        image = self.image
        try:
            factor = self.reduction(shrink)
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            image = _to_mode(image, self.mode)
        except Exception as error:  # every codec behind Pillow has exceptions of its own
            raise DecodeError(self.record_id, _describe(error)) from error
        return image if self.upright is None else image.transpose(self.upright)


_SWAPS_SIDES = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}


def open_picture(
    data: Any,
    record_id: str,
    *,
    channels: int = 3,
    apply_exif: bool = True,
    codec: str = "pillow",
    oversampling: float = 1.25,
) -> Picture:
    """Reads the header of an encoded image, or wraps an array of pixels.

    Args:
      data: bytes of any format that Pillow reads, or uint8 [h, w], [h, w, 1] or [h, w, 3].
      record_id: named in errors.
      channels: 3 for RGB, 1 for grey.
      apply_exif: turns photographs upright that a camera stored on their side.
      codec: one of `CODECS`.
      oversampling: see `Picture.load`.
    Raises: DecodeError: no bytes, or no image format that Pillow knows.
    """
    mode = MODES[channels]
    if isinstance(data, np.ndarray):
        return Picture(_from_array(data, record_id), record_id, mode, None)
    if len(data) == 0:
        raise DecodeError(record_id, "the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.format == "TIFF"  # by Pillow itself, when it loads the pixels
        orientation = image.getexif().get(_ORIENTATION_TAG, 1) if apply_exif != turned else 1
    except UnidentifiedImageError as error:
        raise DecodeError(record_id, f"not an image ({len(data)} bytes that start with {data[:8]!r})") from error
    except Exception as error:  # a damaged header raises what its format's reader happens to raise
        raise DecodeError(record_id, _describe(error)) from error
    if turned:
        orientation = {6: 8, 8: 6}.get(orientation, orientation)  # back to how it is stored
    return Picture(image, record_id, mode, _UPRIGHT.get(orientation), codec, data, oversampling)


@functools.cache
def import_opencv():
    """The cv2 module, on one thread: the pipeline runs several images at a time already.

    Raises: ValueError: OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ValueError("this needs OpenCV: pip install opencv-python-headless") from error
    cv2.setNumThreads(1)
    return cv2


def _from_array(pixels: np.ndarray, record_id: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise DecodeError(record_id, f"expected uint8 pixels [h, w, 1 or 3], found {found}")
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts to 8-bit RGB or grey. Transparency is dropped, as in the pipelines behind the published numbers."""
    if image.mode == mode:
        return image  # convert() would copy
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits at most
        # The high byte, which is what Pillow itself keeps of 16-bit colour; its convert() would clip at 255.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no defined range; store the image with 8 bits per channel")
    elif image.mode == "P":
        image.info.pop("transparency", None)  # convert() would warn of losing it
        image = image.convert("RGB")
    return image.convert(mode)


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
