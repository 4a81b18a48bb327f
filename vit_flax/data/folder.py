"""Pictures in a folder of class folders, or listed in a CSV file."""

import collections
import csv as csv_format
import functools
import hashlib
import io
import itertools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from vit_flax.data.fingerprint import fingerprint_of
from vit_flax.data.splits import is_held_out
from vit_flax.picture_folders import SUFFIXES, folders_in, holds_folders_only, is_picture, split_folders


class Folder:
    """A folder of pictures, in one of three layouts.

    - `root/<class>/**/*.jpg`: no split is given, so a part is held out by a hash of each path; the splits are "train",
      "val" and "all".
    - `root/train/<class>/**/*.jpg`, `root/val/<class>/...`: the splits are the folders' names, in any case; all have
      one set of classes.
    - `csv`: a table with the columns `path` and `label`, and `split` or else a split by hash.

    Pictures are .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif and .tiff files. Hidden files are ignored; other files are
    ignored and named in a warning. Classes are numbered in the order of their sorted names; a table's labels that are
    all numbers, in the order of the numbers. Blanks around the labels and splits of a table do not count.

    Args:
      split: "train", "val", ...
      root: the folder; for a CSV file, what its paths are relative to (None: the folder of the file).
      csv: the table.
      held_out_percent: how much the split by hash holds out as "val".
    """

    def __init__(
        self,
        *,
        split: str,
        root: str | os.PathLike[str] | None = None,
        csv: str | os.PathLike[str] | None = None,
        held_out_percent: float = 10.0,
    ):
        if root is None and csv is None:
            raise ValueError("the folder source needs root= (a folder of class folders) or csv= (a file of path,label)")
        if not 0 < held_out_percent < 100:
            raise ValueError(f"held_out_percent={held_out_percent} must lie between 0 and 100")
        where = Path(csv if root is None else root).expanduser().absolute()  # type: ignore[arg-type]
        self.name, self.split = str(where), split
        if csv is None:
            self.root = where
            self.class_names, pictures = _list_folder(where, split, held_out_percent)
        else:
            self.root = where.parent if root is None else where
            self.class_names, pictures = _list_csv(
                Path(csv).expanduser().absolute(), self.root, split, held_out_percent
            )
            if len(self.class_names) == 1:
                raise ValueError(
                    f"all pictures of {csv} have the label {self.class_names[0]!r}. With one class there is nothing to "
                    "learn: check the column label."
                )
        # One array instead of a million strings: it goes to every worker process.
        self._paths = np.array([os.fsencode(path) for path, _ in pictures])
        self._labels = np.array([label for _, label in pictures], np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.root, os.fsdecode(self._paths[index]))
        with open(path, "rb") as file:
            return {"image": file.read(), "label": self._labels[index], "id": path}

    def __repr__(self) -> str:
        return f"Folder({self.name}, split={self.split!r}, {len(self)} pictures of {len(self.class_names)} classes)"

    def fingerprint(self) -> dict[str, Any]:
        """See `Source`; the digest covers the paths and the labels."""
        digest = hashlib.sha256(b"\0".join(self._paths.tolist()) + self._labels.tobytes()).hexdigest()
        return fingerprint_of(self, name="folder", digest=digest[:16])


def _list_folder(root: Path, split: str, held_out_percent: float) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder of class folders at {root}, found {_what(root)}")
    splits = split_folders(root)
    if not splits:
        _check_level(root)
        classes, by_class = _list_classes(root, root)
        return classes, _split_by_hash(root, classes, by_class, split, held_out_percent)
    folder = splits.get(split.lower())
    if folder is None:
        raise ValueError(
            f"no split {split!r} in {root}, which has the folders {folders_in(root)}; to split one by hash, name it as "
            "root"
        )
    _check_level(root / splits["train"])
    classes, by_class = _list_classes(root, root / folder)
    train_classes = tuple(sorted(_class_folders(root / splits["train"])))
    if classes != train_classes:
        only = {"train": set(train_classes) - set(classes), split: set(classes) - set(train_classes)}
        found = "; ".join(f"only in {name}: {_some(sorted(names))}" for name, names in only.items() if names)
        raise ValueError(f"the class folders of {root / splits['train']} and {root / folder} differ: {found}")
    return classes, [(path, label) for label, paths in enumerate(by_class) for path in paths]


def _check_level(directory: Path) -> None:
    """Raises a ValueError if what should be the classes of a directory is one folder, or are splits."""
    folders = folders_in(directory)
    if len(folders) == 1:
        inner = folders_in(directory / folders[0])
        below = f", with the folders {_some(inner)}; if those are the classes, name {directory / folders[0]}"
        raise ValueError(
            f"expected a folder per class in {directory}, found one, {folders[0]}{below if inner else ''}. "
            "With one class there is nothing to learn."
        )
    like_splits = [f for f in folders if f.lower().startswith(_LIKE_SPLITS) and holds_folders_only(directory / f)]
    if folders and like_splits == folders:
        raise ValueError(
            f"the folders of {directory} look like splits and not like classes: {_some(folders)}. Call the one to "
            "train on 'train', and the others 'val' or 'test'."
        )


_LIKE_SPLITS = ("train", "val", "test", "dev", "eval")


def _list_classes(root: Path, directory: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """Class names, and for each class the sorted paths relative to root."""
    folders = _class_folders(directory)
    classes = tuple(sorted(folders))
    if not classes:
        raise ValueError(f"{directory} has no class folders; expected {directory}/<class>/*{'|'.join(SUFFIXES)}")
    ignored = [name for name in os.listdir(directory) if name not in folders.values() and not name.startswith(".")]
    by_class = [list_pictures(root, directory / folders[name], ignored) for name in classes]
    if ignored:
        some = _some(sorted(os.path.relpath(os.path.join(directory, path), directory) for path in ignored))
        kinds = ", ".join(SUFFIXES)
        _warn(f"{directory}: left out {len(ignored)} that are not in the folder of a class or not {kinds}: {some}")
    if empty := [name for name, paths in zip(classes, by_class) if not paths]:
        raise ValueError(f"class folders without a picture in {directory}: {_some(empty)}; fill or remove them")
    return classes, by_class


@functools.cache  # the splits of one folder say the same
def _warn(text: str) -> None:
    logging.warning("%s", text)


def _class_folders(directory: Path) -> dict[str, str]:
    folders: dict[str, str] = {}
    for folder in folders_in(directory):
        name = unicodedata.normalize("NFC", _checked_name(folder))  # macOS and Linux write é differently
        if name in folders:
            raise ValueError(f"{directory} has two folders called {name!r}, in different Unicode forms; merge them")
        folders[name] = folder
    return folders


def list_pictures(root: Path, directory: Path, ignored: list[str]) -> list[str]:
    """The sorted paths, relative to root, of all pictures below a directory; no hidden ones, none behind links.

    Args:
      root: that the paths are relative to.
      directory: to search.
      ignored: gets the paths of the other files, and of links to folders.
    Raises: ValueError: a name is not UTF-8. OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(directory, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # might lead in a circle
        folders[:] = [name for name in folders if name[0] != "." and name not in links]
        files = [name for name in files if name[0] != "."]
        ignored += [os.path.join(parent, name) for name in files if not is_picture(name)]
        ignored += [os.path.join(parent, name) for name in links]
        below = os.path.relpath(parent, root)  # once a folder: a call per file is most of the time of a large listing
        below = "" if below == os.curdir else below
        found += [os.path.join(below, _checked_name(name)) for name in files if is_picture(name)]
    return sorted(found)


def _split_by_hash(
    root: Path, classes: Sequence[str], by_class: Sequence[Sequence[str]], split: str, held_out_percent: float
) -> list[tuple[str, int]]:
    if split not in ("train", "val", "all"):
        raise ValueError(
            f"{root} gives no splits, so there are 'train', 'val' and 'all' (by hash); found split={split!r}"
        )
    pictures = [(path, label) for label, paths in enumerate(by_class) for path in paths]
    if split == "all":
        return pictures
    held_out = [is_held_out(_portable(path), held_out_percent) for path, _ in pictures]
    kept = np.bincount([label for (_, label), held in zip(pictures, held_out) if not held], minlength=len(classes))
    if not kept.all():
        empty = [classes[label] for label in np.flatnonzero(kept == 0).tolist()]
        raise ValueError(
            f"classes of {root} with all pictures in the held-out {held_out_percent} %: {_some(empty)}; "
            "add pictures, or split by train/ and val/ folders"
        )
    if split == "val" and not any(held_out):
        raise ValueError(
            f"none of the {len(pictures)} pictures of {root} falls into the held-out {held_out_percent} %; "
            "add pictures, raise held_out_percent, or split by train/ and val/ folders"
        )
    return [picture for picture, held in zip(pictures, held_out) if held == (split == "val")]


def _list_csv(
    file: Path, root: Path, split: str, held_out_percent: float
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    rows = _read_csv(file)
    names = {label for _, label, _ in rows}
    numbers = all(name.isascii() and name.isdigit() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))
    if numbers and (twice := [a for a, b in itertools.pairwise(classes) if int(a) == int(b)]):
        raise ValueError(f"{file} writes labels in two ways, e.g. {twice[0]!r} and {int(twice[0])}: choose one")
    number = {name: label for label, name in enumerate(classes)}
    _check_existence(file, root, [path for path, _, _ in rows])
    if again := [row for row, count in collections.Counter(rows).items() if count > 1]:
        rows = list(dict.fromkeys(rows))
        logging.warning(
            "%s lists %d pictures again; each counts once: %s", file, len(again), _some([r[0] for r in again])
        )
    splits = {name for _, _, name in rows}
    if splits == {None}:
        by_class: list[list[str]] = [[] for _ in classes]
        for path, label, _ in rows:
            by_class[number[label]].append(path)
        return classes, _split_by_hash(file, classes, by_class, split, held_out_percent)
    for name in ("train", split):  # the classes are those of "train", as with folders
        if name not in splits:
            raise ValueError(f"no split {name!r} in {file}; its column has {_some(sorted(map(str, splits)))}")
    splits_of: dict[str, set[str | None]] = collections.defaultdict(set)
    for path, _, name in rows:
        splits_of[path].add(name)
    if shared := [path for path, names in splits_of.items() if len(names) > 1]:
        logging.warning("%s: %d pictures are in more than one split: %s", file, len(shared), _some(shared))
    if untaught := sorted(set(classes) - {label for _, label, name in rows if name == "train"}):
        raise ValueError(f"classes of {file} without a picture in the split 'train': {_some(untaught)}")
    return classes, [(path, number[label]) for path, label, name in rows if name == split]


def _read_csv(file: Path) -> list[tuple[str, str, str | None]]:
    """(path, label, split) of each row; paths in one spelling, as a picture must not be in two parts of the data."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    rows, labels = [], {}
    table = csv_format.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(table.line_num, row) for row in table]
    except csv_format.Error as error:  # a quotation mark that is never closed would make one label of all that follows
        raise ValueError(f"{file}, line {table.reader.line_num}: {error}; check the quotation marks") from error
    columns = table.fieldnames or ()
    if not {"path", "label"} <= set(columns):
        raise ValueError(f"expected a first line with the columns path,label (and split) in {file}, found {columns}")
    for line, row in lines:
        path, label = os.path.normpath(row["path"] or ""), (row["label"] or "").strip()
        split = (row["split"] or "").strip() if "split" in columns else None
        if not row["path"] or not label or split == "" or None in row:
            raise ValueError(f"{file}, line {line}: expected {','.join(columns)}, found {row}")
        first = labels.setdefault(path, label)
        if first != label:
            raise ValueError(f"{file}, line {line}: {path} has two labels, {first!r} and {label!r}")
        rows.append((path, unicodedata.normalize("NFC", label), split))
    if not rows:
        raise ValueError(f"{file} lists no pictures")
    return rows


def _check_existence(file: Path, root: Path, paths: Iterable[str]) -> None:
    there: dict[str, set[str]] = {}  # one listing per folder: a question per file takes minutes on network storage
    missing = []
    for path in paths:
        parent, name = os.path.split(os.path.join(root, path))
        if parent not in there:
            there[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if name not in there[parent]:
            missing.append(path)
    if missing:
        raise FileNotFoundError(f"{file} lists {len(missing)} files that are not below {root}: {_some(missing)}")


def _portable(path: str) -> str:
    """The path in one spelling on every system: the split by hash must not depend on where the pictures lie."""
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))


def _checked_name(name: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the file name {os.fsencode(name)!r} is not UTF-8; rename it") from error
    return name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _what(path: Path) -> str:
    return "a file" if path.exists() else "nothing"
