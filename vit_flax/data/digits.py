"""The embedded data set: 1,797 handwritten digits that travel inside scikit-learn, as a TFDS data set of ours.

The pictures are real scans (8x8 pixels, 17 grey levels; Alpaydin and Kaynak 1998, UCI "Optical Recognition of
Handwritten Digits", test part). They are written once, as array_record, and then read like every other TFDS set.
"""

import contextlib
import gzip
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vit_flax.data.datadir import write_once

NUM_EXAMPLES = 1797
NUM_TEST = 359  # 20 %
# Held out are the first NUM_TEST of np.random.default_rng(SPLIT_SEED).permutation(NUM_EXAMPLES). The file is in the
# order in which 13 writers filled it, so a random split mixes the writers; a split by position is a harder task.
SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's handwritten digits with a fixed random held-out 20 %: splits "train" (1,438) and "test" (359)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Random split, NumPy seed 0."}  # noqa: RUF012  (TFDS reads it from the class)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits, 8x8 grey, from scikit-learn.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        order = np.random.default_rng(SPLIT_SEED).permutation(NUM_EXAMPLES)
        return {
            "train": self._generate_examples(np.sort(order[NUM_TEST:])),
            "test": self._generate_examples(np.sort(order[:NUM_TEST])),
        }

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict]]:
        images, labels = read_digits()
        for row in rows.tolist():
            png = io.BytesIO()
            Image.fromarray(images[row]).save(png, "PNG")
            png.seek(0)  # TFDS needs TensorFlow to encode arrays; encoded files it copies
            yield row, {"image": png, "label": int(labels[row])}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads scikit-learn's file without importing scikit-learn (3 s).

    Returns: images uint8 [1797, 8, 8], the grey levels 0..16 stretched to 0..255; labels int64 [1797].

    Raises:
      FileNotFoundError: scikit-learn is not installed, or no longer carries the file.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the digits data set is a file inside scikit-learn: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.int64)
    if table.shape != (NUM_EXAMPLES, 65):
        raise ValueError(f"expected {NUM_EXAMPLES} rows of 65 numbers in {path}, found {table.shape}")
    images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return images, table[:, 64]


def prepare_digits(data_dir: str | os.PathLike[str]) -> Path:
    """Writes the data set below `data_dir` unless it is there (see `write_once`), and returns its directory."""

    def write(scratch: Path) -> None:
        tfds.disable_progress_bar()  # it takes a fraction of a second
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS would announce a download that does not happen
            builder = Digits(data_dir=scratch / "tfds", file_format="array_record")
            builder.download_and_prepare()
        for file in Path(builder.data_dir).iterdir():
            file.rename(scratch / file.name)
        shutil.rmtree(scratch / "tfds")

    directory = Path(data_dir).expanduser() / Digits.name / str(Digits.VERSION)
    return write_once(directory, write, marker="dataset_info.json")
