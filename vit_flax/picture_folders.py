"""How pictures lie in a folder: which files are pictures, which folders are splits and which are classes.

The standard library only: configs look at the folder that they are for, and must cost no heavy import.
"""

import os
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELD_OUT = ("val", "valid", "validation", "test")  # in the order in which one is taken for evaluation


def is_picture(name: str) -> bool:
    """Whether a file is one, by its name; hidden files are none (macOS leaves a ._photo.jpg beside photo.jpg)."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def folders_in(directory: Path) -> list[str]:
    """The names of its folders, sorted, without hidden ones; none if there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith("."))


def holds_folders_only(directory: Path) -> bool:
    """Whether it has folders and no picture beside them: a split, or a folder of class folders."""
    return bool(folders_in(directory)) and not any(map(is_picture, os.listdir(directory)))


def split_folders(root: Path) -> dict[str, str]:
    """Split, in lower case -> its folder in root; empty where the folders of root are classes.

    They are splits if one of them is called train and holds folders only, or if all bear the names of splits; with
    pictures in it and beside others, "train" is a class.

    Raises: ValueError: the names of two of them differ in upper and lower case only.
    """
    splits: dict[str, str] = {}
    for folder in folders_in(root):
        splits.setdefault(folder.lower(), folder)
    named_as_splits = splits.keys() <= {"train", *HELD_OUT}
    if "train" not in splits or not (named_as_splits or holds_folders_only(root / splits["train"])):
        return {}
    if len(splits) != len(folders := folders_in(root)):
        raise ValueError(f"the folders {folders} of {root} are splits, and two of them have the same name: merge them")
    return splits


def held_out_split(root: Path) -> str:
    """The split to evaluate on: that of a folder, else "val", which the source holds out by a hash of each path."""
    splits = split_folders(root)
    return next((name for name in HELD_OUT if name in splits), "val")


def class_folders(root: Path) -> list[str]:
    """The names of the class folders below root, or below its folder train."""
    splits = split_folders(root)
    return folders_in(root / splits["train"] if splits else root)
