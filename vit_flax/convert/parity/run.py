"""Runs the cases, prints a line for each, and rewrites the table of docs/weights.md."""

import argparse
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from vit_flax.convert.parity.case import Case, Reference
from vit_flax.convert.parity.golden import Golden
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.pretrained import Pretrained, load_pretrained
from vit_flax.convert.resample import Grid

MODULES = ("google", "huggingface", "timm", "meta")
TOLERANCE = 1e-5  # of the difference, relative to the largest output where that is above 1
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
HEADER = (
    "| family | architecture | reference | image | largest output | max difference | of gradients |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      case: that was run.
      size: of the image.
      largest: absolute value among the reference's outputs.
      difference: largest absolute one between ours and the reference's.
      gradient: the same among the gradients of all parameters, relative to the largest gradient; None: not compared.
    """

    case: Case
    size: Grid
    largest: float
    difference: float
    gradient: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the differences are those of float32 arithmetic; false for a NaN."""
        return self.difference <= TOLERANCE * max(1.0, self.largest) and (
            self.gradient is None or self.gradient <= TOLERANCE
        )

    def line(self) -> str:
        """As a line of a Markdown table."""
        case, size = self.case, "x".join(map(str, self.size))
        cells = [
            case.family,
            case.name,
            f"{case.library} {case.reference_version()}",
            f"{size}{', resampled' if self.size != case.image_sizes[0] else ''}",
            f"{self.largest:.2f}",
            f"{self.difference:.1e}",
            "" if self.gradient is None else f"{self.gradient:.1e}",
        ]
        return f"| {' | '.join(cells)} |"


def parity(arguments: argparse.Namespace) -> int:
    """The command `--parity`; returns its exit status: 0 all agree, 1 some do not."""
    if arguments.write and arguments.only:
        raise ValueError("--write replaces the whole table: leave --only out.")
    cases = [case for case in all_cases() if re.search(arguments.only or "", f"{case.family} {case.name}")]
    if not cases:
        names = "\n  ".join(dict.fromkeys(f"{case.family} {case.name}" for case in all_cases()))
        raise ValueError(f"--only {arguments.only!r} matches none of the cases, which are\n  {names}")
    photograph = _photograph(arguments.image)
    results, failed, broken, absent = [], [], [], []
    print("\n".join(HEADER))
    for case in cases:
        if case.reference_version() is None:
            absent.append(case)
            continue
        try:
            for result in run(case, photograph):
                results.append(result)
                print(result.line() + ("" if result.ok else "  <- ABOVE THE TOLERANCE"), flush=True)
                failed += [] if result.ok else [case]
        except Exception as error:  # reference libraries raise what they like
            broken.append(case)
            print(f"| {case.family} | {case.name} | FAILED, {type(error).__name__}: {error}", flush=True)
    for case in absent:
        print(f"not run, {case.library} is not installed: {case.family} {case.name}", file=sys.stderr)
    if arguments.write:
        if absent:
            names = ", ".join(dict.fromkeys(case.library for case in absent))
            raise ValueError(f"{arguments.write} was not changed, since lines would be lost: install {names}.")
        if broken:
            names = ", ".join(f"{case.family} {case.name}" for case in broken[:5])
            raise ValueError(
                f"{arguments.write} was not changed, since lines would be lost: {len(broken)} cases failed ({names}"
                f"{', ...' if len(broken) > 5 else ''}); their own lines above say why."
            )
        replace_table(Path(arguments.write), results)
    return 1 if failed or broken else 0


def all_cases() -> list[Case]:
    """Of every module, in the order of `MODULES`."""
    found: list[Case] = []
    for name in MODULES:
        if importlib.util.find_spec(f"vit_flax.convert.parity.{name}"):
            found += importlib.import_module(f"vit_flax.convert.parity.{name}").CASES
    return found


def run(case: Case, photograph: np.ndarray, seed: int = 0) -> list[Result]:
    """Builds a case and compares at each of its image sizes; gradients at the first.

    Raises: ValueError: the checkpoint was not recognised as the case's family, or parts of it were initialised afresh.
    """
    reference = case.build(seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = reference.write(_new_folder(folder, "weights"))
        for size in case.image_sizes:
            changes = {} if size == case.image_sizes[0] else {"image_size": size}
            pretrained = load_pretrained(path, **changes, **case.load)
            _check_loaded(case, pretrained)
            images = _images(case, reference, pretrained, size, photograph)
            theirs = np.asarray(reference.apply(images))
            ours = _output(case, pretrained, images)
            gradient = None
            if reference.gradients is not None and not changes:
                gradient = _gradient_difference(case, pretrained, reference, images, theirs.shape, folder)
            results.append(Result(case, size, float(abs(theirs).max()), _largest_difference(ours, theirs), gradient))
    return results


def _new_folder(parent: str, name: str) -> Path:
    folder = Path(parent) / name
    folder.mkdir()
    return folder


def _check_loaded(case: Case, pretrained: Pretrained) -> None:
    report = pretrained.report
    if report.family != case.family:
        raise ValueError(f"recognised as {report.family!r}, expected {case.family!r}")
    made_up = {p for p, (why, _) in report.reinitialised.items() if not why.endswith("does not store")}
    if made_up:
        raise ValueError(f"not loaded: {sorted(made_up)}")


def _images(case: Case, reference: Reference, pretrained: Pretrained, size: Grid, photograph: np.ndarray) -> np.ndarray:
    """What both models see, `[b, h, w, c]`: the photograph for full sizes, noise for tiny ones."""
    if isinstance(reference, Golden):
        return reference.images
    preprocess = (pretrained.preprocess or Preprocess(size)).with_image_size(size)
    noise = np.random.default_rng(1).integers(0, 256, (*size, len(preprocess.mean)), dtype=np.uint8)
    return preprocess(photograph if case.full_size else noise)[None]


def _apply(case: Case, pretrained: Pretrained, params: Any, images: Any) -> jax.Array:
    result, out = cast(Any, pretrained.model.apply({"params": params}, images, train=False))
    return out[case.output] if case.output else result


def _output(case: Case, pretrained: Pretrained, images: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params, images: _apply(case, pretrained, params, images))
        return np.asarray(run(pretrained.params, jnp.asarray(images)))


def _gradient_difference(
    case: Case, pretrained: Pretrained, reference: Reference, images: np.ndarray, shape: Sequence[int], folder: str
) -> float:
    """The reference's gradients travel through the conversion table as if they were weights."""
    assert reference.gradients is not None
    cotangent = np.random.default_rng(2).standard_normal(tuple(shape), np.float32)
    path = reference.gradients(images, cotangent, _new_folder(folder, "gradients"))
    loaded = load_pretrained(path, **case.load)
    with jax.default_matmul_precision("highest"):
        total = jax.jit(jax.grad(lambda p, x: jnp.sum(_apply(case, pretrained, p, x) * cotangent)))
        ours = _flat(total(pretrained.params, jnp.asarray(images)))
    theirs = _flat(loaded.params)
    largest = max(float(abs(theirs[p]).max()) for p in loaded.report.loaded)
    return max(_largest_difference(ours[p], theirs[p]) for p in loaded.report.loaded) / largest


def _flat(params: Any) -> Mapping[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in flatten_dict(params, sep="/").items()}


def _largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"our output has the shape {ours.shape}, the reference's {theirs.shape}")
    return float(abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def _photograph(path: str | None) -> np.ndarray:
    """uint8 `[h, w, 3]`: the file given, else the photograph of a temple that scikit-learn carries."""
    if path is None:
        sklearn = importlib.util.find_spec("sklearn")
        if sklearn is None or not sklearn.submodule_search_locations:
            raise ValueError("Give a photograph with --image FILE (scikit-learn, which carries one, is not installed).")
        path = f"{sklearn.submodule_search_locations[0]}/datasets/images/china.jpg"
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def replace_table(path: Path, results: Sequence[Result]) -> None:
    """Writes the table between the two markers of a Markdown file.

    Raises: ValueError: the file lacks them.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: expected the lines {BEGIN!r} and {END!r}, once each, around the table.")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join([*HEADER, *(result.line() for result in results)])
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
