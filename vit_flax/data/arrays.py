"""Pictures that are arrays already: in memory, or in .npy and .npz files."""

import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_flax.data.fingerprint import fingerprint_of
from vit_flax.data.splits import split_ranges


class Arrays:
    """Pictures in memory, or in .npy/.npz files.

    Args:
      split: which part: a key of `arrays`, or the prefix in `path`, or TFDS syntax over them ("train[:90%]").
      arrays: {split: (images uint8 [n, h, w] or [n, h, w, c], labels int [n] or uint8 [n, v])}.
      path: an .npz file with `<split>_images` and `<split>_labels`, or a folder with `<split>_images.npy` (read
        through a memory map, so it may be larger than the memory) and `<split>_labels.npy`.
      class_names: None: the numbers 0..max as text.
      name: how messages and fingerprints call it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, no such split, arrays of the wrong kind, a label that no class has.
    """

    def __init__(
        self,
        *,
        split: str,
        arrays: Mapping[str, tuple[Any, Any]] | None = None,
        path: str | os.PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ):
        if arrays is not None and path is None:
            self._reopen = None
        elif path is not None and arrays is None:
            self._reopen = functools.partial(Arrays, split=split, path=path, class_names=class_names, name=name)
            path = Path(path).expanduser()
            try:
                arrays = _load(path)
            except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"cannot read arrays from {path}: {error}") from error
        else:
            raise ValueError("give the arrays source either arrays= or path=")
        images, labels = _select(split, arrays)
        if class_names is None:
            # Over all splits: the last class may be missing in one of them.
            labels_of_all = [np.asanyarray(labels) for _, labels in arrays.values()]
            count = (
                labels.shape[1] if labels.ndim == 2 else max(int(part.max(initial=-1)) for part in labels_of_all) + 1
            )
            class_names = [str(label) for label in range(count)]
        self.name, self.split, self.images, self.labels = name, split, images, labels
        self.class_names = tuple(class_names)
        self._check_labels()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index], "id": f"{self.name}:{self.split}[{index}]"}

    def __repr__(self) -> str:
        return f"Arrays({self.name}, split={self.split!r}, images {self.images.shape})"

    def __reduce__(self) -> Any:
        # A memory map would be pickled as all the pixels behind it.
        return super().__reduce__() if self._reopen is None else (self._reopen, ())

    def fingerprint(self) -> dict[str, Any]:
        """See `Source`; the digest covers the labels and their order."""
        return fingerprint_of(self, digest=hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:16])

    def _check_labels(self) -> None:
        num_classes = len(self.class_names)
        if self.labels.ndim == 2:
            bad = (self.labels != 0) & (self.labels != 1)
            if self.labels.shape[1] != num_classes:
                raise ValueError(f"{self!r} has labels of {self.labels.shape[1]} entries and {num_classes} class names")
            expected = "zeros and ones"
        else:
            bad = (self.labels < 0) | (self.labels >= num_classes)
            expected = f"0..{num_classes - 1} ({num_classes} classes)"
        if bad.any():
            row = int(np.argwhere(bad)[0, 0])
            count = int(bad.reshape(len(bad), -1).any(axis=1).sum())
            raise ValueError(
                f"{self.name}:{self.split}[{row}] has label {self.labels[row]}, expected {expected}; "
                f"{count} records are like this"
            )


def _select(split: str, arrays: Mapping[str, tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for name, start, stop in split_ranges(split, {name: len(labels) for name, (_, labels) in arrays.items()}):
        images, labels = (np.asanyarray(array) for array in arrays[name])
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"expected images uint8 [n, h, w] or [n, h, w, c], found {images.dtype} {images.shape}")
        one_column = labels.shape[1:] == (1,)  # Keras gives class numbers so; they would pass for a single class
        if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2) or one_column or len(labels) != len(images):
            expected = "integer labels [n] or, for several classes at once, zeros and ones [n, v]"
            raise ValueError(f"expected {expected} for {len(images)} images, found {labels.dtype} {labels.shape}")
        parts.append((images[start:stop], labels[start:stop]))
    if len(parts) == 1:
        return parts[0]  # still a memory map, where it was one
    images, labels = zip(*parts)
    return np.concatenate(images), np.concatenate(labels)


def _load(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if path.suffix == ".npz":
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return _pair(path, sorted(file), file.__getitem__)
    if not path.is_dir():
        raise FileNotFoundError(f"expected an .npz file or a folder of .npy files at {path}")

    def load(name: str) -> np.ndarray:
        return np.load(path / f"{name}.npy", mmap_mode="r" if name.endswith("_images") else None, allow_pickle=False)

    return _pair(path, sorted(entry.stem for entry in path.glob("*.npy")), load)


def _pair(
    path: Path, names: Sequence[str], load: Callable[[str], np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    splits = [name.removesuffix("_images") for name in names if name.endswith("_images")]
    if not splits or any(f"{split}_labels" not in names for split in splits):
        raise ValueError(f"expected <split>_images and <split>_labels in {path}, found {names}")
    return {split: (load(f"{split}_images"), load(f"{split}_labels")) for split in splits}
