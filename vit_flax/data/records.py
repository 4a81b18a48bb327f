"""The project's own stored form: array_record shards of encoded pictures, as `vit_flax.data.prepare` writes them.

A folder holds `<split>-00000-of-00016.array_record` files and `records.json`, which lists them. A record is a msgpack
map `{"image": bytes, "label": int, "id": str}`.
"""

import bisect
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from vit_flax.data.decode import DecodeError
from vit_flax.data.fingerprint import fingerprint_of
from vit_flax.data.splits import split_ranges

INDEX = "records.json"
# One record per group: a group is what is read at once, and training reads in random order.
WRITER_OPTIONS = "group_size:1"


class Records:
    """A folder that `python -m vit_flax.data.prepare` wrote.

    Args:
      split: a split of the set it was made from, or TFDS syntax over them ("train[:98%]").
      directory: the folder.

    Raises:
      FileNotFoundError: no prepared set there, or a shard is missing.
      ValueError: no such split, or a shard is damaged; it is named. Reading raises DecodeError for a damaged record.
    """

    def __init__(self, *, split: str, directory: str | os.PathLike[str]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.directory, self.split = Path(directory).expanduser().absolute(), split
        index = read_index(self.directory)
        self.name, self.class_names = index["name"], tuple(index["class_names"])
        shards = {name: dict(part["shards"]) for name, part in index["splits"].items()}
        sizes = {name: sum(part.values()) for name, part in shards.items()}
        self._digest = index["digest"]
        self._ranges = []  # (first row in the reader of the split, number of rows, split)
        self._readers = {}
        for name, start, stop in split_ranges(split, sizes):
            paths = [self.directory / shard for shard in shards[name]]
            if missing := [path.name for path in paths if not path.exists()]:
                raise FileNotFoundError(f"{self.directory} lacks {len(missing)} of its files, e.g. {missing[0]}")
            files = [str(path) for path, n in zip(paths, shards[name].values()) if n]
            try:
                self._readers[name] = ArrayRecordDataSource(files)
            except RuntimeError as error:
                raise ValueError(f"{_first_damaged(files)} is damaged ({error}); prepare the set again") from error
            if len(self._readers[name]) != sizes[name]:
                found = f"{len(self._readers[name])} records in {name}, expected {sizes[name]}"
                raise ValueError(f"{self.directory} does not fit its {INDEX}: found {found}; prepare it again")
            self._ranges.append((start, stop - start, name))
        self._ends = list(itertools.accumulate(count for _, count, _ in self._ranges))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside 0..{len(self) - 1} of {self!r}")
        part = bisect.bisect_right(self._ends, index)
        start, count, name = self._ranges[part]
        row = int(index) - (self._ends[part] - count) + start
        try:
            return unpack(self._readers[name][row])
        except (RuntimeError, ValueError) as error:
            raise DecodeError(f"{self.directory}:{name}[{row}]", f"the record is damaged: {error}") from error

    def __repr__(self) -> str:
        return f"Records({self.directory}, split={self.split!r}, {len(self)} examples)"

    def fingerprint(self) -> dict[str, Any]:
        """See `Source`; the digest covers what the set was made from and how."""
        return fingerprint_of(self, digest=self._digest)


def _first_damaged(files: Iterable[str]) -> str:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for file in files:
        try:
            ArrayRecordDataSource([file])
        except RuntimeError:
            return file
    return "one of the files"


def pack(example: dict[str, Any]) -> bytes:
    """An example whose image is encoded, as one record."""
    label = example["label"]
    label = label.tolist() if isinstance(label, np.ndarray | np.generic) else label
    record = msgpack.packb({"image": example["image"], "label": label, "id": example["id"]})
    assert record is not None
    return record


def write_shard(path: Path, values: Iterable[bytes]) -> int:
    """Writes records to one file and returns their number.

    Raises:
      OSError: the file cannot be written, for example because the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    count = 0
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for value in values:
            writer.write(value)
            count += 1
    finally:
        try:
            writer.close()
        except RuntimeError as error:  # array_record reports a full disk only here
            raise OSError(f"cannot write {path}: {error}") from error
    if (found := ArrayRecordReader(str(path)).num_records()) != count:
        raise OSError(f"{path} has {found} records after writing {count}")
    return count


def unpack(record: bytes) -> dict[str, Any]:
    """The inverse of `pack`."""
    return msgpack.unpackb(record)


def read_index(directory: Path) -> dict[str, Any]:
    """Reads `records.json`."""
    path = directory / INDEX
    if not path.exists():
        raise FileNotFoundError(
            f"expected a prepared set (with {INDEX}) in {directory}; "
            "write one with python -m vit_flax.data.prepare, or let an interrupted preparation finish"
        )
    return json.loads(path.read_text(encoding="utf-8"))
