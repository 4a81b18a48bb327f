r"""TFRecords that somebody has already, as array_record: without TensorFlow, and without decoding a picture.

    python -m vit_flax.data.tfrecord ~/tensorflow_datasets/cifar10/3.0.2 --out ~/array_record/cifar10/3.0.2
    python -m vit_flax.data.tfrecord train=~/imagenet/train-* val=~/imagenet/validation-* --out DIR \
        --image_key image/encoded --label_key image/class/label --label_offset -1 --class_names names.txt

The first form converts a data set that TFDS prepared; the result is read with `dict(name="tfds", directory=DIR)`. The
second converts files of tf.train.Example; the result is read with `dict(name="records", directory=DIR)`. The checksums
inside TFRecords are not verified; `python -m vit_flax.data.check` decodes every picture of the result.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_flax.data import records
from vit_flax.data.datadir import write_once
from vit_flax.data.read import checked_label

TFDS_INFO = "dataset_info.json"


def convert_tfds(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Converts a data set that TFDS prepared as tfrecord.

    Args:
      directory: the folder that holds its dataset_info.json.
      out: the folder to write.

    Raises:
      ValueError: no such data set, or a shard with another number of records than it says.
      FileExistsError: `out` holds something already.
    """
    out = _absent(out)
    source = Path(directory).expanduser()
    if not (source / TFDS_INFO).exists():
        raise FileNotFoundError(f"expected a data set that TFDS prepared (with {TFDS_INFO}) in {source}")
    info = json.loads((source / TFDS_INFO).read_text(encoding="utf-8"))
    if (found := info.get("fileFormat", "tfrecord")) != "tfrecord":
        raise ValueError(f"{source} is stored as {found}, not as tfrecord")
    lengths = [int(length) for split in info["splits"] for length in split["shardLengths"]]
    shards = sorted(file for file in source.iterdir() if ".tfrecord" in file.name)
    if len(shards) != len(lengths):
        raise ValueError(f"{source} has {len(shards)} tfrecord files, expected {len(lengths)}")

    def write(scratch: Path) -> None:
        total = 0
        for shard in _progress(shards):
            total += records.write_shard(
                scratch / shard.name.replace(".tfrecord", ".array_record"), read_tfrecord(shard)
            )
        if total != sum(lengths):
            raise ValueError(f"{source} holds {total} records, {TFDS_INFO} says {sum(lengths)}")
        for file in source.iterdir():
            if file.suffix in (".json", ".txt") and file.name != TFDS_INFO:
                shutil.copy(file, scratch)
        (scratch / TFDS_INFO).write_text(json.dumps({**info, "fileFormat": "array_record"}, indent=2), encoding="utf-8")

    return write_once(out, write, marker=TFDS_INFO)


def convert_examples(
    files: Mapping[str, Sequence[Path]],
    *,
    out: str | os.PathLike[str],
    image_key: str,
    label_key: str,
    label_offset: int,
    class_names: Sequence[str],
) -> Path:
    """Converts files of tf.train.Example to the source `records`.

    Args:
      files: {split: its files}.
      out: the folder to write.
      image_key: the feature that holds the encoded picture.
      label_key: the feature that holds one integer.
      label_offset: added to it; -1 where the labels start at 1.
      class_names: in the order of the labels.

    Raises:
      ValueError: a record without these features, or with a label that no class has; it is named.
      FileExistsError: `out` holds something already.
    """
    out = _absent(out)

    # Before the progress bar, whose thread must not import anything while this import is under way.
    from tensorflow_datasets.proto import tf_example_pb2

    new_example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]

    def examples(file: Path) -> Iterator[bytes]:
        for row, record in enumerate(read_tfrecord(file)):
            example = _parse_example(new_example(), record, image_key, label_key, f"{file}[{row}]")
            example["label"] += label_offset
            checked_label(example, len(class_names))
            yield records.pack(example)

    def write(scratch: Path) -> None:
        splits = {}
        for split, shards in files.items():
            names = [f"{split}-{i:05d}-of-{len(shards):05d}.array_record" for i in range(len(shards))]
            counts = [
                records.write_shard(scratch / name, examples(shard)) for shard, name in zip(_progress(shards), names)
            ]
            if not sum(counts):
                raise ValueError(f"the files of {split!r} hold no record: {', '.join(map(str, shards[:5]))}")
            splits[split] = {"shards": dict(zip(names, counts))}
        index = {"name": "tfrecord", "class_names": list(class_names), "splits": splits}
        digest = hashlib.sha256(json.dumps(index).encode()).hexdigest()[:16]
        (scratch / records.INDEX).write_text(json.dumps({**index, "digest": digest}, indent=1), encoding="utf-8")

    return write_once(out, write, marker=records.INDEX)


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """The records of one file: each a length, a checksum of it, the data, a checksum of them.

    Raises:
      ValueError: the file ends early, is compressed, or is no TFRecord file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while header := file.read(12):
            start = file.tell()
            if start == 12 and header[:2] == b"\x1f\x8b":
                raise ValueError(f"{path} is compressed: gunzip it first")
            length = int.from_bytes(header[:8], "little")
            if start + length + 4 > size:  # whatever the length says: it may ask for all the memory there is
                raise ValueError(f"{path} ends early or is no TFRecord file: {size} bytes, {length} more from {start}")
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)


def _parse_example(example: Any, record: bytes, image_key: str, label_key: str, record_id: str) -> dict[str, Any]:
    from google.protobuf.message import DecodeError

    try:
        example.ParseFromString(record)
    except DecodeError as error:
        raise ValueError(f"{record_id} is no tf.train.Example: {error}") from error
    features = example.features.feature
    for key in (image_key, label_key):
        if key not in features:
            raise ValueError(f"{record_id} has no feature {key!r}; it has {sorted(features)}")
    images, labels = features[image_key].bytes_list.value, features[label_key].int64_list.value
    if len(images) != 1 or len(labels) != 1:
        found = f"{len(images)} byte strings and {len(labels)} integers"
        raise ValueError(f"{record_id}: expected one picture in {image_key!r} and one in {label_key!r}, found {found}")
    return {"image": images[0], "label": labels[0], "id": record_id}


def _absent(out: str | os.PathLike[str]) -> Path:
    """The folder to write: what an earlier conversion left there may be of other files, or with other labels."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something already; remove it or choose another folder")
    return out


def _progress(shards: Sequence[Path]) -> Iterator[Path]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(shards, description="files", console=Console(stderr=True)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vit_flax.data.tfrecord")
    parser.add_argument("source", nargs="+", help="a folder that TFDS prepared, or SPLIT=GLOB ...")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--image_key", default="image/encoded", help="feature of the picture (default %(default)s)")
    parser.add_argument("--label_key", default="image/class/label", help="feature of the label (default %(default)s)")
    parser.add_argument("--label_offset", type=int, default=0, help="-1 where labels start at 1 (default %(default)s)")
    parser.add_argument("--class_names", help="text file with one class name per line")
    arguments = parser.parse_args(argv)
    try:
        if len(arguments.source) == 1 and not _SPLIT.match(arguments.source[0]):
            out = convert_tfds(arguments.source[0], arguments.out)
            name = "tfds"
        else:
            out = _convert_examples(arguments)
            name = "records"
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f'read it with source=dict(name="{name}", directory="{out}")')
    return 0


_SPLIT = re.compile(r"([\w-]+)=")  # a path may hold an equals sign, too: train=/data/day=1/part-*


def _convert_examples(arguments: argparse.Namespace) -> Path:
    files: dict[str, list[Path]] = {}
    split = ""
    for word in arguments.source:  # the shell may have expanded the pattern: train=a-0 a-1 val=b-0
        match = _SPLIT.match(word)
        split, pattern = (match[1], word[match.end() :]) if match else (split, word)
        files.setdefault(split, []).extend(Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern))))
    if "" in files or not all(files.values()):
        raise ValueError(f"expected SPLIT=FILES with at least one file each, found {arguments.source}")
    if arguments.class_names is None:
        raise ValueError("tf.train.Example files say no class names: give --class_names FILE, one name per line")
    names = Path(arguments.class_names).expanduser().read_text(encoding="utf-8-sig").rstrip().splitlines()
    if not all(map(str.strip, names)):
        raise ValueError(f"{arguments.class_names} has a line without a name: expected one class name per line")
    return convert_examples(
        files,
        out=arguments.out,
        image_key=arguments.image_key,
        label_key=arguments.label_key,
        label_offset=arguments.label_offset,
        class_names=names,
    )


if __name__ == "__main__":
    sys.exit(main())
