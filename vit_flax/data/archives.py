"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from the archives their authors published.

TFDS prepares none of them without TensorFlow. An archive is looked for in the data folder, checked by its SHA-256,
parsed once, and kept as .npy files that later runs read in milliseconds.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from vit_flax.data.arrays import Arrays
from vit_flax.data.datadir import data_dir_or_default, write_once

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # {split: (images uint8 [n, h, w, c], labels int64 [n])}


def mnist(*, split: str, data_dir: str | os.PathLike[str] | None = None, download: bool | None = None) -> Arrays:
    """MNIST (LeCun et al. 1998): 28x28 grey, 10 classes, "train" 60,000 and "test" 10,000; see `open_archive`."""
    return open_archive("mnist", split=split, data_dir=data_dir, download=download)


def fashion_mnist(
    *, split: str, data_dir: str | os.PathLike[str] | None = None, download: bool | None = None
) -> Arrays:
    """Fashion-MNIST (arXiv:1708.07747): as MNIST, with pieces of clothing; see `open_archive`."""
    return open_archive("fashion_mnist", split=split, data_dir=data_dir, download=download)


def cifar10(*, split: str, data_dir: str | os.PathLike[str] | None = None, download: bool | None = None) -> Arrays:
    """CIFAR-10 (Krizhevsky 2009): 32x32 RGB, 10 classes, "train" 50,000 and "test" 10,000; see `open_archive`."""
    return open_archive("cifar10", split=split, data_dir=data_dir, download=download)


def cifar100(*, split: str, data_dir: str | os.PathLike[str] | None = None, download: bool | None = None) -> Arrays:
    """CIFAR-100 (Krizhevsky 2009): as CIFAR-10, with its 100 fine classes; see `open_archive`."""
    return open_archive("cifar100", split=split, data_dir=data_dir, download=download)


def open_archive(name: str, *, split: str, data_dir: str | os.PathLike[str] | None, download: bool | None) -> Arrays:
    """Opens one of `ARCHIVES`.

    Args:
      name: a key of `ARCHIVES`.
      split: "train", "test", or TFDS syntax over them ("train[:98%]").
      data_dir: where the archive lies and the parsed form goes; see `data_dir_or_default`.
      download: whether an archive that is not there is fetched; None: if its server answers within a second.

    Raises:
      FileNotFoundError: the archive is not there (the message says what goes where), or cannot be downloaded.
      ValueError: a file of that name with another content.
    """
    folder = data_dir_or_default(data_dir)
    parsed: Splits = {}

    def parse() -> tuple[Splits, tuple[str, ...]]:
        archive = ARCHIVES[name]
        found = {file: _find(name, file, folder) for file in archive.files}
        missing = _fetch(name, [file for file, path in found.items() if path is None], folder, download)
        paths = {file: path or missing[file] for file, path in found.items()}
        splits, class_names = archive.parse(paths)
        parsed.update(splits)
        return splits, class_names

    def write(scratch: Path) -> None:
        splits, class_names = parse()
        for part, (images, labels) in splits.items():
            np.save(scratch / f"{part}_images.npy", images)
            np.save(scratch / f"{part}_labels.npy", labels)
        (scratch / "class_names.json").write_text(json.dumps(class_names), encoding="utf-8")

    try:
        directory = write_once(folder / f"{name}-arrays", write, marker="class_names.json")
    except PermissionError as error:
        logging.warning("%s; parsing %s again in every run", error, name)
        splits, class_names = parse()
        return Arrays(split=split, arrays=splits, class_names=class_names, name=name)
    class_names = json.loads((directory / "class_names.json").read_text(encoding="utf-8"))
    return Arrays(split=split, path=directory, class_names=class_names, name=name)


@dataclasses.dataclass(frozen=True)
class Archive:
    """What was published: where, which files (bytes, SHA-256), and how to read them."""

    url: str
    files: Mapping[str, tuple[int, str]]
    parse: Callable[[Mapping[str, Path]], tuple[Splits, tuple[str, ...]]]


def parse_mnist(paths: Mapping[str, Path], class_names: tuple[str, ...]) -> tuple[Splits, tuple[str, ...]]:
    """Reads the four IDX files: big-endian headers of 16 (images) and 8 (labels) bytes, then uint8."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = gzip.decompress(paths[f"{prefix}-images-idx3-ubyte.gz"].read_bytes())
        labels = gzip.decompress(paths[f"{prefix}-labels-idx1-ubyte.gz"].read_bytes())
        count, height, width = np.frombuffer(pixels, ">u4", count=3, offset=4).tolist()
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(count, height, width, 1)
        splits[split] = (images, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))
    return splits, class_names


def parse_cifar(
    paths: Mapping[str, Path], files: Mapping[str, tuple[str, ...]], names: str, label_bytes: int
) -> tuple[Splits, tuple[str, ...]]:
    """Reads the binary version: records of the label bytes (the last one counts), then 3072 bytes as [c, h, w].

    Args:
      paths: one entry, the .tar.gz file.
      files: the members that make up each split.
      names: the member with the class names.
      label_bytes: 1, or 2 where a coarse label comes first.
    """
    (path,) = paths.values()
    members = {}
    wanted = {file for part in files.values() for file in part} | {names}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if (file := Path(member.name).name) in wanted and (stream := tar.extractfile(member)) is not None:
                members[file] = stream.read()
    splits = {}
    for split, part in files.items():
        data = np.frombuffer(b"".join(members[file] for file in part), np.uint8).reshape(-1, label_bytes + 3072)
        images = data[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = (np.ascontiguousarray(images), data[:, label_bytes - 1].astype(np.int64))
    return splits, tuple(members[names].decode().split())


def _find(name: str, file: str, folder: Path) -> Path | None:
    size, sha256 = ARCHIVES[name].files[file]
    own = folder / name / file
    wrong = None
    for path in (own, folder / file, folder / "downloads" / "manual" / file):
        if path.exists():
            if path.stat().st_size == size and _sha256(path) == sha256:
                return path
            wrong = path  # MNIST and Fashion-MNIST have the same file names
    if wrong == own:
        raise ValueError(f"{own} is damaged or another file: expected {size:,} bytes with SHA-256 {sha256}; remove it")
    return None


def _fetch(name: str, missing: Sequence[str], folder: Path, download: bool | None) -> dict[str, Path]:
    """Downloads the files, or asks for all of them at once."""
    archive = ARCHIVES[name]
    urls = {file: f"{archive.url}/{file}" for file in missing}
    if download or (missing and download is None and _answers(urls[missing[0]])):
        return {file: _download(url, folder / name / file, *archive.files[file]) for file, url in urls.items()}
    if not missing:
        return {}
    wanted = ", ".join(f"{file} ({archive.files[file][0]:,} bytes) from {url}" for file, url in urls.items())
    why = "" if download is False else "; that server did not answer within a second, download=True waits longer"
    raise FileNotFoundError(
        f"{name} needs the file{'s' * (len(missing) > 1)} {wanted}; put {'it' if len(missing) == 1 else 'them'} into "
        f"{folder / name}{why}"
    )


def _answers(url: str) -> bool:
    """Whether a server answers within a second; without a network, looking its name up may take a minute to fail."""
    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=1).close()
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(1)
    return bool(answers)


def _download(url: str, path: Path, size: int, sha256: str) -> Path:
    from rich.progress import wrap_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = None
    try:
        with (
            urllib.request.urlopen(url, timeout=10) as response,
            wrap_file(response, total=size, description=path.name) as stream,
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file,
        ):
            part = Path(file.name)
            while block := stream.read(2**20):
                file.write(block)
        if part.stat().st_size != size or _sha256(part) != sha256:
            raise ValueError(f"{url} gave another file than expected ({size:,} bytes with SHA-256 {sha256})")
        os.replace(part, path)
    except OSError as error:
        raise FileNotFoundError(
            f"cannot download {url} ({error}); fetch it elsewhere and put it into {path.parent}"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_digits(paths: Mapping[str, Path]) -> tuple[Splits, tuple[str, ...]]:
    return parse_mnist(paths, tuple("0123456789"))


def _parse_clothes(paths: Mapping[str, Path]) -> tuple[Splits, tuple[str, ...]]:
    # The order of https://github.com/zalandoresearch/fashion-mnist
    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag"
    return parse_mnist(paths, (*names.split(), "Ankle boot"))


def _parse_cifar10(paths: Mapping[str, Path]) -> tuple[Splits, tuple[str, ...]]:
    train = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    return parse_cifar(paths, {"train": train, "test": ("test_batch.bin",)}, "batches.meta.txt", label_bytes=1)


def _parse_cifar100(paths: Mapping[str, Path]) -> tuple[Splits, tuple[str, ...]]:
    return parse_cifar(paths, {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", label_bytes=2)


# Sizes and sums as TFDS 4.9.10 registers them (its url_checksums folder).
ARCHIVES = {
    "mnist": Archive(
        url="https://storage.googleapis.com/cvdf-datasets/mnist",
        files={
            "train-images-idx3-ubyte.gz": (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            "train-labels-idx1-ubyte.gz": (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            "t10k-images-idx3-ubyte.gz": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        },
        parse=_parse_digits,
    ),
    "fashion_mnist": Archive(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        files={
            "train-images-idx3-ubyte.gz": (
                26421880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels-idx1-ubyte.gz": (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            "t10k-images-idx3-ubyte.gz": (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            "t10k-labels-idx1-ubyte.gz": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        },
        parse=_parse_clothes,
    ),
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz",
        files={
            "cifar-10-binary.tar.gz": (170052171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
        },
        parse=_parse_cifar10,
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz",
        files={
            "cifar-100-binary.tar.gz": (168513733, "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
        },
        parse=_parse_cifar100,
    ),
}
