"""Re-encodes a large collection once, so that training reads it at several times the speed.

    python -m vit_flax.data.prepare --source folder root=~/pictures --splits train val --out DIR --short_side_px 256

Pictures with a longer short side are scaled to it and stored as JPEG, the others are kept as they are. The result is
the source `records` (`dict(name="records", directory=DIR)`), with the same splits, classes and order. Run the same
command again to go on after an interruption.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_flax.data import records, workers
from vit_flax.data.decode import DecodeError, open_picture
from vit_flax.data.read import OnError, checked_label
from vit_flax.data.sources import Source, make_source, parse_source
from vit_flax.files import unfinished, write_atomically
from vit_flax.log_lines import show_warnings

PLAN = "plan.json"  # what is being written; becomes records.json when it is complete
MIN_SHARD_EXAMPLES = 512
MAX_SHARDS = 128  # per split: each is an open file while training


def prepare(
    source: Mapping[str, Any],
    *,
    splits: Sequence[str],
    out: str | os.PathLike[str],
    short_side_px: int | None,
    quality: int = 90,
    on_error: OnError = "raise",
    num_workers: int | None = None,
) -> Path:
    """Writes `splits` of a source as array_record shards.

    Args:
      source: as in a config: `name` and that source's arguments.
      splits: names of whole splits.
      out: the folder to write; empty, absent, or begun by the same command (it may have stopped at a bad picture, and
        go on with on_error="skip").
      short_side_px: the short side that larger pictures are scaled to; None: all are kept as they are.
      quality: of the JPEGs, 1..95.
      on_error: "raise", or "skip": leave bad pictures out, and list them in the result's records.json.
      num_workers: processes; None: one per core.

    Returns: the folder.

    Raises:
      ValueError: bad arguments, `out` holds something else, or another process is writing it.
      DecodeError: a picture that cannot be read; it is named. The finished shards stay, so little is done twice.
      ChildProcessError: a worker process was killed.
    """
    if short_side_px is not None and short_side_px < 1:
        raise ValueError(f"short_side_px={short_side_px} must be positive, or None")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality={quality} must lie in 1..95 (above, Pillow's files grow and the pictures do not)")
    if wrong := [split for split in splits if not re.fullmatch(r"[\w-]+", split)]:
        raise ValueError(f"expected names of whole splits, found {wrong}; parts can be read from the result")
    sources = {split: make_source(split=split, **source) for split in splits}
    directory = Path(out).expanduser().absolute()
    plan = {
        "name": source["name"],
        "class_names": _common_classes(sources),
        "sources": {split: opened.fingerprint() for split, opened in sources.items()},
        "short_side_px": short_side_px,
        "quality": quality,
        "on_error": on_error,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        if not _begin(directory, plan):
            return directory
        shards = {split: _shards(split, len(opened)) for split, opened in sources.items()}
        encode = functools.partial(encode_picture, short_side_px=short_side_px, quality=quality)
        jobs = [
            (sources[split], directory / name, rows, encode, on_error)
            for split, parts in shards.items()
            for name, rows in parts.items()
        ]
        _run(jobs, num_workers or workers.num_cores())
        _finish(directory, plan, shards)
    return directory


def encode_picture(data: Any, record_id: str, *, short_side_px: int | None, quality: int) -> bytes:
    """One picture as it will be stored.

    Args:
      data: encoded bytes, or uint8 [h, w, c].
      record_id: named in errors.
      short_side_px: see `prepare`.
      quality: see `prepare`.

    Raises:
      DecodeError: the picture is bad. Pictures that are kept as they are get decoded, too.
    """
    picture = open_picture(data, record_id)
    width, height = picture.size
    shrink = 1.0 if short_side_px is None else min(width, height) / short_side_px
    image = picture.load(max(shrink, 1.0))
    stored = io.BytesIO()
    if shrink > 1:
        size = (max(round(width / shrink), 1), max(round(height / shrink), 1))
        image.resize(size, Image.Resampling.BICUBIC).save(stored, "JPEG", quality=quality)
    elif isinstance(data, np.ndarray):
        image.save(stored, "PNG")
    else:
        return bytes(data)
    return stored.getvalue()


def _common_classes(sources: Mapping[str, Source]) -> list[str]:
    classes = {split: opened.class_names for split, opened in sources.items()}
    if len(set(classes.values())) != 1:
        raise ValueError(
            f"the splits have different classes: { {split: len(names) for split, names in classes.items()} }"
        )
    return list(next(iter(classes.values())))


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the folder for this process: two that write the same shards would spoil each other's."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{directory} is being written by another process; wait for it, stop it, or choose another folder"
            ) from None
        except OSError:
            pass  # a file system that has no such locks
        yield
    finally:
        os.close(descriptor)


def _begin(directory: Path, plan: dict[str, Any]) -> bool:
    """Writes the plan down, or compares it with the one that is there. False: everything is done already."""
    for file in (records.INDEX, PLAN):
        if (directory / file).exists():
            there = json.loads((directory / file).read_text(encoding="utf-8"))
            if (there.get("on_error"), plan["on_error"]) == ("raise", "skip"):
                there["on_error"] = "skip"  # what is finished had nothing to skip
            if differing := [key for key in plan if there.get(key) != plan[key]]:
                raise ValueError(
                    f"{directory} holds another preparation (other {', '.join(differing)}); choose another folder"
                )
            if file == PLAN:
                _write_json(directory / PLAN, plan)
            return file == PLAN
    if any(file != unfinished(directory / PLAN) for file in directory.iterdir()):
        raise ValueError(f"{directory} holds files that are no preparation; choose an empty folder")
    _write_json(directory / PLAN, plan)
    return True


def _shards(split: str, num_examples: int) -> dict[str, range]:
    """{file name: rows}."""
    per_shard = max(MIN_SHARD_EXAMPLES, math.ceil(num_examples / MAX_SHARDS))
    starts = range(0, num_examples, per_shard)
    return {
        f"{split}-{i:05d}-of-{len(starts):05d}.array_record": range(start, min(start + per_shard, num_examples))
        for i, start in enumerate(starts)
    }


def _run(jobs: list[tuple[Any, ...]], num_workers: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    todo = [job for job in jobs if not (job[1].exists() and _note(job[1]).exists())]
    done = sum(len(job[2]) for job in jobs) - sum(len(job[2]) for job in todo)
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", done), context.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool = concurrent.futures.ProcessPoolExecutor(
        max(1, min(num_workers, len(todo))), context, initializer=_start_worker, initargs=(counter, stop)
    )
    with pool, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("pictures", total=sum(len(job[2]) for job in jobs), completed=done)
        running = {pool.submit(_write_shard, *job) for job in todo}
        try:
            while running:
                finished, running = concurrent.futures.wait(
                    running, timeout=0.2, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                progress.update(task, completed=counter.value)
                for future in finished:
                    future.result()
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise ChildProcessError(
                    "a worker process was killed, perhaps because the memory is full; the same command goes on from "
                    "here, and a smaller num_workers needs less memory"
                ) from error
            raise


_counter: Any = None  # of the pictures that all workers have written
_stop: Any = None  # an event: leave the shard unfinished


def _start_worker(counter: Any, stop: Any) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    workers.die_with_parent()


def _write_shard(source: Source, path: Path, rows: range, encode: Any, on_error: OnError) -> None:
    """Writes one shard beside its place and renames it, with a note of how many records it has."""
    skipped: list[str] = []

    def packed() -> Iterator[bytes]:
        for row in rows:
            if _stop.is_set():
                raise KeyboardInterrupt
            try:
                example = source[row]
                checked_label(example, len(source.class_names))
                yield records.pack({**example, "image": encode(example["image"], example["id"])})
            except (DecodeError, OSError) as error:
                if on_error == "raise":
                    raise
                skipped.append(str(error))
            with _counter.get_lock():
                _counter.value += 1

    part = path.with_name(f".{path.name}.part")
    num_records = records.write_shard(part, packed())
    _write_json(_note(path), {"num_records": num_records, "skipped": skipped})
    os.replace(part, path)


def _finish(directory: Path, plan: dict[str, Any], shards: Mapping[str, Mapping[str, range]]) -> None:
    notes = {name: json.loads(_note(directory / name).read_text("utf-8")) for part in shards.values() for name in part}
    skipped = [problem for note in notes.values() for problem in note["skipped"]]
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    splits = {split: {"shards": {name: notes[name]["num_records"] for name in part}} for split, part in shards.items()}
    _write_json(directory / records.INDEX, {**plan, "digest": digest, "skipped": skipped, "splits": splits})
    for name in notes:
        _note(directory / name).unlink()
    (directory / PLAN).unlink()


def _note(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.json")


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vit_flax.data.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", nargs="+", required=True, metavar=("NAME", "KEY=VALUE"), help="as in a config")
    parser.add_argument("--splits", nargs="+", required=True, help="names of whole splits")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--short_side_px", type=int, help="scale larger pictures to this; without it, keep all as they are"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default %(default)s)")
    parser.add_argument("--on_error", choices=("raise", "skip"), default="raise", help="what bad pictures do")
    parser.add_argument("--num_workers", type=int, help="processes; default: one per core")
    arguments = vars(parser.parse_args(argv))
    try:
        directory = prepare(parse_source(arguments.pop("source")), **arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    index = records.read_index(directory)
    for problem in index["skipped"]:
        print(f"skipped: {problem}")
    sizes = {split: sum(part["shards"].values()) for split, part in index["splits"].items()}
    print(
        f"{directory}: {', '.join(f'{split} {size}' for split, size in sizes.items())}; {len(index['skipped'])} skipped"
    )
    print(f'read it with source=dict(name="records", directory="{directory}")')
    return 0


if __name__ == "__main__":
    show_warnings()
    sys.exit(main())
