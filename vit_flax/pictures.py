"""Pictures for people: a grid of images with captions, and a confusion matrix."""

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FAINT = (32, 33, 36), (255, 255, 255), (120, 124, 130)
BLUE, RED = (31, 92, 178), (192, 57, 43)


def grid(images: np.ndarray, captions: Sequence[str], *, columns: int = 8, tile_px: int = 96) -> np.ndarray:
    """Images side by side with text below each, uint8 [h, w, 3].

    Args:
      images: uint8 [n, h, w, c], c being 1 or 3.
      captions: one each, of one line or several; lines are cut to the width of a tile.
      columns: of the grid.
      tile_px: longer side of an image in the picture.
    """
    font, gap = _font(12), 6
    text_px = 4 + 14 * max(caption.count("\n") + 1 for caption in captions)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (tile_px + gap) + gap, rows * (tile_px + text_px + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = gap + number % columns * (tile_px + gap)
        top = gap + number // columns * (tile_px + text_px + gap)
        sheet.paste(to_image(image, tile_px), (left, top))
        for place, line in enumerate(caption.split("\n")):
            draw.text((left, top + tile_px + 2 + 14 * place), _cut(line, font, tile_px), fill=INK, font=font)
    return np.asarray(sheet)


def caption(target: np.ndarray, class_names: Sequence[str]) -> str:
    """The classes of a target [v], the heaviest three; where it is mixed, each with its part on a line: "70% dog".

    Parts that round to 0 % are left out.
    A name that the font of the pictures cannot draw loses its accents, or gives way to "class" and its number.
    """
    heaviest: list[int] = [i for i in np.argsort(-target, kind="stable")[:3].tolist() if target[i] >= 0.005]
    names = {i: _drawable(class_names[i], i) for i in heaviest}
    if all(target[i] >= 0.995 for i in heaviest):
        return ", ".join(names.values())
    # The part first: a long name is cut at its end.
    return "\n".join(f"{target[i]:.0%} {name}" for i, name in names.items())


def to_image(image: np.ndarray, side_px: int) -> Image.Image:
    """An RGB picture whose longer side is `side_px`; small images are enlarged without smoothing.

    Args:
      image: uint8 [h, w, c]; of other than 1 or 3 channels, the first is shown.
      side_px: of the result.
    """
    pixels = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    h, w = pixels.shape[:2]
    scale = side_px / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """A confusion matrix as a picture, uint8 [h, w, 3]: rows in parts of their sums, blue where right, red where wrong.

    Args:
      matrix: counts [true class, predicted class].
      class_names: one per row.
    """
    count = len(matrix)
    class_names = [_drawable(name, i) for i, name in enumerate(class_names)]
    cell = max(8, min(40, 640 // count))
    font = _font(min(13, max(8, cell - 2)))
    label_px = 12 + max(int(font.getlength(_cut(name, font, 128))) for name in class_names)
    step = math.ceil(11 / cell)  # names that would overlap are left out
    size = label_px + count * cell + 8
    sheet = Image.new("RGB", (size, size + 20), PAPER)
    draw = ImageDraw.Draw(sheet)
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for i in range(count):
        for j in range(count):
            x, y = label_px + j * cell, label_px + i * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=_shade(parts[i, j], BLUE if i == j else RED))
            if cell >= 24 and matrix[i, j]:
                ink = PAPER if parts[i, j] > 0.5 else INK
                draw.text((x + cell / 2 - 1, y + cell / 2 - 1), str(matrix[i, j]), fill=ink, font=font, anchor="mm")
        if i % step == 0:
            middle = label_px + i * cell + cell / 2
            name = _cut(class_names[i], font, label_px - 8)
            draw.text((label_px - 5, middle), name, fill=INK, font=font, anchor="rm")
            _draw_upright(sheet, name, font, (round(middle), label_px - 5))
    draw.text((label_px, size), "rows: true class   columns: predicted", fill=FAINT, font=_font(11))
    return np.asarray(sheet)


def _drawable(name: str, number: int) -> str:
    """A class name in the letters of Pillow's own font, which are ASCII's: without accents, else the class's number."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return letters if letters.isascii() else f"class {number}"


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _shade(part: float, ink: tuple[int, int, int]) -> tuple[int, int, int]:
    """Between a light grey for 0 and the ink for 1; small parts are raised, as single mistakes matter."""
    amount = math.sqrt(part)
    red, green, blue = (round(244 + (channel - 244) * amount) for channel in ink)
    return red, green, blue


def _draw_upright(sheet: Image.Image, text: str, font: ImageFont.FreeTypeFont, foot: tuple[int, int]) -> None:
    """Text that reads upwards, ending above `foot`."""
    width, height = math.ceil(font.getlength(text)) + 2, math.ceil(font.size) + 4
    strip = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(strip).text((0, height / 2), text, fill=INK, font=font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (foot[0] - turned.width // 2, foot[1] - turned.height))


def _cut(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """The text on one line, with an ellipsis where it is too long."""
    text = " ".join(text.split())[:200]
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
