"""Draws what the model gets: a training batch after all augmentation, and evaluation images, with their labels.

    python -m vit_flax.data.show --config configs/digits.py --out batch.png [--step 100] [--config.data.batch_size=32]

The training batch is the one of the step asked for, with that step's random numbers, pixel for pixel as the model sees
it (normalisation undone for the picture). Mixed targets are written with their shares. The evaluation images are spread
evenly over the split, which is in the order of the classes.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image, ImageDraw, ImageFont

from vit_flax.command_line import given_config, parse_flags, stop
from vit_flax.log_lines import show_warnings

SMALL_PX, LARGE_PX = 96, 224  # small images are shown up to 96 px large, by a whole factor; large ones at 224


def show(config: Any, out: str | Path, *, step: int = 0, max_images: int = 32) -> list[str]:
    """Writes one picture with both grids.

    Args:
      config: as for `train`.
      out: the .png file to write.
      step: whose training batch is drawn.
      max_images: drawn in each grid.

    Returns: one line per grid: what it shows, and mean and standard deviation of what the model gets (near 0 and 1
      where the config's mean and std fit the data).

    Raises:
      ValueError: the config cannot be run, or `out` is no .png file in a folder that exists.
      OSError: `out` cannot be written.
    """
    import jax

    from vit_flax import pictures
    from vit_flax.job import build

    out = Path(out).expanduser()
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ValueError(f"--out={out} must be a .png file in a folder that exists")
    if step < 0 or max_images < 1:
        raise ValueError(f"--step={step} must not be negative, and --max_images={max_images} at least 1")
    job = build(config, devices=jax.devices()[:1])
    grids, lines = [], []
    for title, (images, targets, pixels) in (
        (f"training, step {step}: batch of {job.data.batch_size}", _train_batch(job, step)),
        (f"evaluation: split of {len(job.data.eval_source)}", _eval_images(job, max_images)),
    ):
        title += " images, " + "x".join(str(length) for length in images.shape[1:])
        captions = [pictures.caption(target, job.data.class_names) for target in targets[:max_images]]
        longer = max(images.shape[1:3])
        tile_px = min(longer * max(SMALL_PX // longer, 1), LARGE_PX)
        grids.append(_titled(title, pictures.grid(images[:max_images], captions, tile_px=tile_px)))
        lines.append(f"{title}; the model gets mean {pixels.mean():.3f}, std {pixels.std():.3f}")
    canvas = Image.new("RGB", (max(g.width for g in grids), sum(g.height for g in grids)), "white")
    for index, grid in enumerate(grids):
        canvas.paste(grid, (0, sum(g.height for g in grids[:index])))
    canvas.save(out)
    return lines


def _train_batch(job: Any, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images as uint8, targets, and the images as the model gets them."""
    batches = job.host_batches(step)
    images, targets = map(np.asarray, job.augmented(next(batches), step))
    batches.close()
    return job.visible(images), targets, images


def _eval_images(job: Any, max_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import jax.numpy as jnp

    from vit_flax.data.read import Reader

    data = job.data
    read = Reader(data.eval_source, data.eval_transform, on_error=data.reading["on_error"], replace=False)
    rows = np.linspace(0, len(data.eval_source) - 1, min(max_images, len(data.eval_source))).round().astype(int)
    examples = [example for example in (read(row, None) for row in rows.tolist()) if example["mask"]]
    images, labels = (np.stack([example[key] for example in examples]) for key in ("image", "label"))
    return images, _targets(labels, data.num_classes), np.asarray(job.normalize(jnp.asarray(images)))


def _targets(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return labels.astype(np.float32) if labels.ndim == 2 else np.eye(num_classes, dtype=np.float32)[labels]


def _titled(title: str, grid: np.ndarray) -> Image.Image:
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (max(grid.shape[1], round(font.getlength(title)) + 12), grid.shape[0] + 24), "white")
    ImageDraw.Draw(sheet).text((6, 6), title, "black", font)
    sheet.paste(Image.fromarray(grid), (0, 24))
    return sheet


def main(argv: list[str]) -> None:
    """The command; what the user can put right ends with a message and exit code 2."""
    show_warnings()
    values = flags.FLAGS.flag_values_dict()
    config = given_config()
    if len(argv) > 1 or config is None or values["out"] is None:
        stop(f"expected --config FILE --out FILE.png, found {' '.join(sys.argv[1:]) or 'nothing'}", code=2)
    try:
        lines = show(config, values["out"], step=values["step"], max_images=values["max_images"])
    except (ValueError, OSError) as error:
        stop(str(error), code=2)
    print(*lines, values["out"], sep="\n")


def _parse_flags(argv: list[str]) -> list[str]:
    # Defined here and not above: the launcher has a flag --config, too, and a test may import both.
    config_flags.DEFINE_config_file(
        "config", None, "The experiment, as for vit_flax.main.", lock_config=False, accept_new_attributes=True
    )
    flags.DEFINE_string("out", None, "The .png file to write.")
    flags.DEFINE_integer("step", 0, "The training step whose batch is drawn.")
    flags.DEFINE_integer("max_images", 32, "Images drawn of each batch.")
    return parse_flags(argv, code=2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
