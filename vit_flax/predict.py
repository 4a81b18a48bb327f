"""Classifies pictures with any checkpoint.

python -m vit_flax.predict --checkpoint runs/digits photo.jpg folder/     the five most probable classes of each picture
python -m vit_flax.predict --checkpoint vit.safetensors --json *.jpg      one JSON object a line
python -m vit_flax.predict --checkpoint runs/digits --csv folder/         a table: image, class_1, probability_1, ...

A checkpoint is whatever `load_pretrained` opens: a file, a folder, the workdir of a run, an address. The pictures go
through what the checkpoint says they must go through; with the workdir of a run, through the evaluation transforms of
the run. The probabilities of a picture's classes add up to 1, unless the checkpoint says that each class has its own.
Exit status: 0 done, 1 some pictures could not be read, 2 an error with a message.
"""

import argparse
import csv
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.convert import Preprocess, Pretrained, load_pretrained
from vit_flax.convert.arguments import print_no_more, size, whole
from vit_flax.convert.preprocess import Evaluation
from vit_flax.convert.table import PROBABILITIES
from vit_flax.data.decode import MODES, DecodeError, open_picture
from vit_flax.data.folder import list_pictures
from vit_flax.data.transforms import make_transform
from vit_flax.gpu_flags import set_gpu_flags
from vit_flax.log_lines import show_warnings
from vit_flax.picture_folders import SUFFIXES

log = logging.getLogger(__name__)


def predict(
    pretrained: Pretrained, paths: Sequence[Path], *, top: int = 5, batch_size: int = 16
) -> Iterator[tuple[Path, list[dict[str, Any]] | DecodeError | OSError]]:
    """Yields for every picture, in order, its most probable classes, or why it could not be read.

    Args:
      pretrained: a classifier whose `evaluation` or `preprocess` is known.
      paths: of the pictures.
      top: how many classes.
      batch_size: pictures per step of the model; the last step is filled up, so that one program serves all.

    Yields: the path, and `{"class": name, "index": int, "probability": float}` for each class, the best one first.
    Raises: ValueError: the checkpoint has no classes, does not say how pictures were prepared, or says it for
      another number of channels than it has.
    """
    if pretrained.model.num_classes is None:
        raise ValueError(f"{pretrained.report.path} has no head: it gives features, not classes. Fine-tune it first.")
    if pretrained.model.pool == "none":
        raise ValueError(f"{pretrained.report.path} gives every token by itself, not one result for a picture.")
    if pretrained.report.family == "hf:clip":
        raise ValueError(
            f"{pretrained.report.path} has no classes: its head projects into the space of CLIP's text tower. "
            "Fine-tune it first."
        )
    only = pretrained.model.num_classes == 1 and pretrained.probabilities == "softmax"
    if only or pretrained.probabilities == "none":
        found = "one output, a number" if only else "outputs that are numbers"
        raise ValueError(f"{pretrained.report.path} has {found} and not classes: use it from Python.")
    prepare, params = _preparation(pretrained), jax.device_put(pretrained.params)
    names = pretrained.class_names or [str(i) for i in range(pretrained.model.num_classes)]

    @jax.jit
    def probabilities(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = pretrained.model.apply({"params": params}, images, train=False)[0]
        return PROBABILITIES[pretrained.probabilities](logits)

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            read = list(pool.map(lambda path: _read(path, prepare), batch))
            images = np.zeros((batch_size, *prepare.shape), np.float32)
            for row, image in zip(images, read):
                if isinstance(image, np.ndarray):
                    row[...] = image
            table = np.asarray(probabilities(params, jnp.asarray(images)))
            for path, image, row in zip(batch, read, table):
                yield path, image if isinstance(image, Exception) else _best(row, names, top)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """From an encoded picture and its name to what the model takes: `shape` is (rows, columns, channels)."""

    shape: tuple[int, int, int]
    apply: Callable[[bytes, str], np.ndarray]


def _preparation(pretrained: Pretrained) -> Preparation:
    path, evaluation, preprocess = pretrained.report.path, pretrained.evaluation, pretrained.preprocess
    if evaluation is not None and evaluation.image_size == pretrained.image_size:
        prepare = as_evaluated(evaluation, path)
    elif preprocess is not None:
        prepare = Preparation((*preprocess.image_size, len(preprocess.mean)), partial(_preprocessed, preprocess))
    else:
        problem = "does not say what its pictures went through"
        if evaluation is not None:
            problem = f"says for one image size only what its pictures went through: {evaluation}"
        raise ValueError(f"{path} {problem}. {_ADVICE}")
    found = prepare.shape[2]
    if found != pretrained.channels or found not in MODES:
        raise ValueError(
            f"The model of {path} takes {pretrained.channels} channels, mean and std are for {found}, and pictures are "
            "read with 1 or 3. Give --preprocess one mean and one std per channel of the model."
        )
    return prepare


_ADVICE = (
    """Say it, for example: --preprocess '{"image_size": [224, 224], "mean": [0.5, 0.5, 0.5], """
    """"std": [0.5, 0.5, 0.5], "crop_fraction": 0.9, "filter": "bicubic"}'"""
)


def as_evaluated(evaluation: Evaluation, path: str) -> Preparation:
    """What a run's evaluation does to a picture.

    Raises: ValueError: it draws random numbers; `path` is the run's, for the message.
    """
    transform = make_transform(evaluation.transforms)
    if not transform.ops:  # its pictures had one size; others are brought to it
        size = {"op": "resize", "size_px": evaluation.image_size}
        transform = make_transform([*evaluation.transforms, size])
    if not transform.deterministic:
        raise ValueError(f"{path}: no picture has one answer, {evaluation} draw random numbers. {_ADVICE}")
    shape = (*evaluation.image_size, transform.decode.channels)
    mean, std = np.array(evaluation.mean), np.array(evaluation.std)

    def prepare(data: bytes, name: str) -> np.ndarray:
        pixels = transform({"image": data, "id": name})["image"]
        if pixels.shape != shape:
            raise DecodeError(name, f"it has shape {pixels.shape} after {evaluation}, the model takes {shape}")
        return ((pixels / 255 - mean) / std).astype(np.float32)

    return Preparation(shape, prepare)


def _preprocessed(preprocess: Preprocess, data: bytes, name: str) -> np.ndarray:
    pixels = np.asarray(open_picture(data, name, channels=len(preprocess.mean)).load())
    return preprocess(pixels if pixels.ndim == 3 else pixels[:, :, None])


def _read(path: Path, prepare: Preparation) -> np.ndarray | DecodeError | OSError:
    try:
        return prepare.apply(path.read_bytes(), str(path))
    except (DecodeError, OSError) as error:
        return error
    except ValueError as error:  # of a transform, such as a picture smaller than a crop
        return DecodeError(str(path), str(error))


def _best(probabilities: np.ndarray, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"class": names[i], "index": int(i), "probability": float(probabilities[i])} for i in order]


def find_pictures(places: Sequence[str]) -> list[Path]:
    """The files named, and the pictures in the folders named, sorted within each folder; what training takes of them.

    Raises: FileNotFoundError: a place does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for place in (Path(place).expanduser() for place in places):
        if not place.exists():
            raise FileNotFoundError(f"{place}: there is no such picture or folder.")
        others: list[str] = []
        inside = [place / name for name in list_pictures(place, place, others)] if place.is_dir() else [place]
        if not inside:
            raise FileNotFoundError(f"{place}: the folder holds no picture ({', '.join(SUFFIXES)}).")
        if others:
            log.warning("left out %d that are not %s, such as %s", len(others), ", ".join(SUFFIXES), min(others))
        found += inside
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    set_gpu_flags()
    try:
        paths = find_pictures(arguments.images)
        preprocess = None if arguments.preprocess is None else _read_preprocess(arguments.preprocess)
        pretrained = load_pretrained(arguments.checkpoint, family=arguments.family, image_size=arguments.image_size)
        if preprocess is not None:
            pretrained = _with_preprocess(pretrained, preprocess)
        unread, table = 0, None
        for path, found in predict(pretrained, paths, top=arguments.top, batch_size=arguments.batch_size):
            if isinstance(found, Exception):
                unread += 1
                print(f"error: {found}", file=sys.stderr, flush=True)
            elif arguments.json:
                print(json.dumps({"image": str(path), "top": found}), flush=True)
            elif arguments.csv:
                cells = {"image": str(path)}
                for rank, best in enumerate(found, start=1):
                    cells |= {f"class_{rank}": best["class"], f"probability_{rank}": f"{best['probability']:.6f}"}
                if table is None:
                    table = csv.DictWriter(sys.stdout, list(cells), lineterminator="\n")
                    table.writeheader()
                table.writerow(cells)
                sys.stdout.flush()
            else:
                classes = "  ".join(f"{best['probability']:.3f} {best['class']}" for best in found)
                print(f"{path}  {classes}", flush=True)
    except BrokenPipeError:
        print_no_more()
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if unread else 0


def _read_preprocess(text: str) -> Preprocess:
    try:
        return Preprocess.from_dict(json.loads(text))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--preprocess {text}: {error}\n{_ADVICE}") from error


def _with_preprocess(pretrained: Pretrained, preprocess: Preprocess) -> Pretrained:
    # Learned positions are of one size; another with as many patches would go through, its positions out of place.
    if pretrained.model.posemb == "learned" and preprocess.image_size != pretrained.image_size:
        want = "x".join(map(str, preprocess.image_size))
        raise ValueError(
            f"--preprocess: the model takes pictures of {pretrained.image_size}, found image_size="
            f"{preprocess.image_size}. Give --image_size {want}, too, to have its positions resampled."
        )
    return dataclasses.replace(pretrained, preprocess=preprocess, evaluation=None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vit_flax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    parser.add_argument("--checkpoint", required=True, help="file, folder, workdir or address")
    parser.add_argument("--family", help="of the checkpoint; found from the file unless given")
    parser.add_argument(
        "--image_size", type=size, metavar="N|HxW", help="in pixels; another than the checkpoint's resamples positions"
    )
    parser.add_argument("--preprocess", metavar="JSON", help="instead of the checkpoint's, or where it has none")
    parser.add_argument("--top", type=whole(1), default=5, help="classes per picture (5)")
    parser.add_argument("--batch_size", type=whole(1), default=16, help="pictures per step (16)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per picture instead of text")
    form.add_argument("--csv", action="store_true", help="a table with a line per picture instead of text")
    return parser


if __name__ == "__main__":
    show_warnings()
    sys.exit(main())
