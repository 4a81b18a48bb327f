"""From a source to batches, on Grain: step -> batch is a pure function of (source, seed, step, process).

A batch is `{"image": uint8 [b, h, w, c], "label": int32 [b], "mask": bool [b]}` (labels uint8 [b, v] where the data are
multi-label); b is the process's share of the global batch. The mask is False on padding, which only evaluation has.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from absl import logging

from vit_flax.data import workers
from vit_flax.data.read import OnError, Reader, Transform
from vit_flax.data.sources import Source

Batch = dict[str, np.ndarray]
DecodeOnce = Literal["auto"] | bool

DECODE_ONCE_BYTES = 2**30  # "auto" keeps sets below this decoded in memory


def train_batches(
    source: Source,
    *,
    transform: Transform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    decode_once: DecodeOnce = "auto",
    on_error: OnError = "raise",
) -> "Batches":
    """Endless training batches, from `start_step` on.

    Every epoch visits each example once in a new order; batches straddle epochs, so none is dropped. Batch `start_step`
    costs the same as batch 0, whatever the number of workers and processes before.

    Args:
      source: what to read.
      transform: `f(example, rng) -> example` with "image" uint8 [h, w, c] of one size; its attribute `deterministic`
        says whether it never draws from `rng`.
      batch_size: examples per step over all processes.
      seed: any non-negative integer.
      start_step: the step of the first batch.
      process_index: this process.
      process_count: the number of processes that share a batch.
      num_threads: threads that read and decode, in each worker process where there are some; `num_threads + 1` batches
        are read ahead. None: see `workers.default_threads`.
      num_workers: worker processes; 0: threads of this process only. Workers need the main script to be importable
        (`if __name__ == "__main__":`).
      decode_once: decode the whole set into memory first and batch by index. "auto": where it takes less than 1 GiB
        and the transform is deterministic. The batches are the same; workers are not needed and not started.
      on_error: "raise", or "skip": a picture that cannot be read is replaced by the next one, logged and counted.

    Raises:
      ValueError: a batch_size that process_count does not divide or that is larger than the split; a bad label;
        pictures of different sizes after the transform.
      DecodeError: a bad picture; as every error about a record, it names it. It may come with any batch.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    _check_reading(num_threads, num_workers)
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must not be negative")
    if batch_size > len(source):
        raise ValueError(f"batch_size={batch_size} is larger than the {len(source)} examples of {source!r}")
    read = Reader(source, transform, on_error=on_error, replace=True)
    import grain

    order_seed, transform_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    order = Order(len(source), order_seed)
    # Process i gets the i-th part of every batch: joined in their order, the batch of a single process.
    shard = slice(process_index, None, process_count)
    if arrays := _decode_once(decode_once, read, len(source)):
        parts = grain.MapDataset.range(sys.maxsize)[shard][start_step:]
        batches = parts.map(lambda part: _take(arrays, order(_positions(part, local_batch_size))))
        return _start(batches, read, local_batch_size, 0, 0)
    rows = grain.MapDataset.range(sys.maxsize).map(order.row)
    # Random numbers are drawn before the shards part, so that they do not depend on the number of processes.
    examples = rows.random_map(read, seed=transform_seed)
    batches = examples.batch(local_batch_size, drop_remainder=True)[shard][start_step:]
    return _start(batches, read, local_batch_size, num_threads, num_workers)


def eval_batches(
    source: Source,
    *,
    transform: Transform,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    decode_once: DecodeOnce = "auto",
    on_error: OnError = "raise",
) -> "EvalBatches":
    """Every example of a source exactly once, in order: a sized object that can be iterated again and again.

    All processes see the same number of full batches; what fills up the last ones has mask False and zeros elsewhere,
    and so has, with on_error="skip", a picture that cannot be read. The arguments are those of `train_batches`, but the
    transform must not be random and a batch may be larger than the split.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    _check_reading(num_threads, num_workers)
    if not transform.deterministic:
        raise ValueError("the transforms of an evaluation must not draw random numbers")
    read = Reader(source, transform, on_error=on_error, replace=False)
    import grain

    num_batches = math.ceil(len(source) / batch_size)
    shard = slice(process_index, None, process_count)
    if arrays := _decode_once(decode_once, read, len(source) + 1):  # the last row is padding
        parts = grain.MapDataset.range(num_batches * process_count)[shard]
        batches = parts.map(lambda part: _take(arrays, _positions(part, local_batch_size)))
        num_threads, num_workers = 0, 0
    else:
        rows = grain.MapDataset.range(num_batches * batch_size).map(functools.partial(read, rng=None))
        batches = rows.batch(local_batch_size, drop_remainder=True)[shard]
    start = functools.partial(_start, batches, read, local_batch_size, num_threads, num_workers)
    return EvalBatches(num_batches, start)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """The batches of one evaluation: `len` of them, at every iteration the same."""

    num_batches: int
    start: Any  # () -> Batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> "Batches":
        return self.start()


class Batches(Iterator[Batch]):
    """An iterator over batches that can be closed, that counts what was skipped, and that stays broken once it broke.

    Grain's own iterators answer the call after an error with StopIteration or an unrelated error, which a loop would
    take for the end of the data.

    Attributes:
      skipped: {row: how often it was skipped} of the records that could not be read (on_error="skip").
      close: stops the threads and workers; called at exit, too.
    """

    def __init__(self, iterator: Any, source: Source):
        self._iterator, self._source = [iterator], source
        self._error: Exception | None = None
        self.skipped: collections.Counter[int] = collections.Counter()
        self.close = weakref.finalize(self, lambda held: held.pop().close(), self._iterator)

    @property
    def num_skipped(self) -> int:
        """How many reads were skipped so far, on this process."""
        return self.skipped.total()

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if not self._iterator:
            raise ValueError("these batches were closed")
        try:
            batch = next(self._iterator[0])
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise
        self._count(batch.pop("skipped"))
        return batch

    def _count(self, skipped: np.ndarray) -> None:
        rows = skipped[skipped >= 0].tolist()
        if new := set(rows) - self.skipped.keys():
            bad = len(self.skipped) + len(new)
            logging.warning(
                "on_error='skip': %d of %d records of %r are bad so far", bad, len(self._source), self._source
            )
        self.skipped.update(rows)


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows of an endless stream of epochs: each is a random permutation of its own, a function of seed and epoch.

    Whole permutations, because they take a fraction of the time of drawing row by row: 20 ms per million rows.
    """

    num_rows: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The rows at some positions of the stream."""
        epochs, places = np.divmod(positions, self.num_rows)
        rows = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            rows[here] = _permutation(self.num_rows, self.seed, epoch)[places[here]]
        return rows

    def row(self, position: int) -> int:
        """The row at one position."""
        epoch, place = divmod(position, self.num_rows)
        return int(_permutation(self.num_rows, self.seed, epoch)[place])


@functools.lru_cache(maxsize=2)  # threads that read ahead may be in the next epoch already
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    rows = np.random.default_rng((seed, epoch)).permutation(num_rows)
    return rows.astype(np.min_scalar_type(num_rows))


class Ahead(Iterator[Any]):
    """Training batches on their way to the devices, one ahead of the one that is worked on.

    Args:
      batches: to read from.
      put: brings a batch to the devices.
      count_skipped: whether records may be skipped (on_error="skip"), and are counted.

    Attributes:
      counts: to be logged with the metrics of the batch handed out last: "skipped_records", how many pictures of this
        process's share stand in for one that could not be read.
    """

    def __init__(self, batches: Batches, put: Callable[[Batch], Any], *, count_skipped: bool):
        self._batches, self._put, self._count_skipped = batches, put, count_skipped
        self._next = self._fetch()
        self.counts: dict[str, Any] = {}

    def __next__(self) -> Any:
        if isinstance(self._next, Exception):
            raise self._next
        (batch, self.counts), self._next = self._next, self._fetch()
        return batch

    def _fetch(self) -> tuple[Any, dict[str, Any]] | Exception:
        before = self._batches.num_skipped
        try:
            batch = self._put(next(self._batches))
        except Exception as error:  # of a batch that nobody has asked for yet, and that the last step never asks for
            return error
        skipped = self._batches.num_skipped - before
        return batch, {"skipped_records": skipped} if self._count_skipped else {}


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is outside 0..{process_count - 1}")
    return batch_size // process_count


def _positions(part: int, length: int) -> np.ndarray:
    """The positions in the stream of examples that make up one process's part of a batch."""
    return np.arange(part * length, (part + 1) * length)


def _check_reading(num_threads: int | None, num_workers: int) -> None:
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1, or None")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must not be negative")


def _decode_once(decode_once: DecodeOnce, read: Reader, num_rows: int) -> Batch | None:
    """All rows as arrays, or None where they are better read again each time."""
    if decode_once is True and not read.deterministic:
        raise ValueError("decode_once=True, but the transforms draw random numbers; use 'auto' or False")
    small = read.deterministic and num_rows * read.example_bytes < DECODE_ONCE_BYTES
    if not (small if decode_once == "auto" else decode_once):
        return None
    arrays = {key: np.empty((num_rows, *np.shape(value)), value.dtype) for key, value in read(0, None).items()}

    def fill(start: int) -> None:
        for row in range(start, min(start + 256, num_rows)):
            for key, value in read(row, None).items():
                arrays[key][row] = value

    with concurrent.futures.ThreadPoolExecutor(min(workers.num_cores(), workers.MAX_THREADS)) as pool:
        for _ in pool.map(fill, range(0, num_rows, 256)):
            pass
    return arrays


def _take(arrays: Batch, rows: np.ndarray) -> Batch:
    rows = np.minimum(rows, len(arrays["mask"]) - 1)  # everything beyond the end is padding, which is the last row
    return {key: array[rows] for key, array in arrays.items()}


def _start(batches: Any, read: Reader, batch_size: int, num_threads: int | None, num_workers: int) -> Batches:
    batch_bytes = batch_size * read.example_bytes
    started = workers.start(batches, num_threads=num_threads, num_workers=num_workers, batch_bytes=batch_bytes)
    return Batches(started, read.source)
