"""From a source to batches, on Grain: step -> batch is a pure function of (source, seed, step, process).

A batch is `{"image": uint8 [b, h, w, c], "label": int32 [b], "mask": bool [b]}` (labels uint8 [b, v] where the data are
multi-label); b is the process's share of the global batch. The mask is False on padding, which only evaluation has.
"""

import concurrent.futures
import dataclasses
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from vit_flax.data.sources import Example, Source

Batch = dict[str, np.ndarray]
Transform = Callable[[Example, np.random.Generator | None], Example]
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
      num_threads: threads that read and decode, in each worker process where there are some. None: the number of
        cores, at most 16. Each builds one batch at a time, so up to `num_threads + 1` batches lie in memory.
      num_workers: worker processes; 0: threads of this process, which is faster up to about 8 cores.
      decode_once: decode the whole set into memory first and batch by index. "auto": where it takes less than 1 GiB
        and the transform is deterministic. The batches are the same.

    Raises:
      ValueError: a batch_size that process_count does not divide or that is larger than the split; a bad label;
        pictures of different sizes after the transform.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    if batch_size > len(source):
        raise ValueError(f"batch_size={batch_size} is larger than the {len(source)} examples of {source!r}")
    import grain

    order_seed, transform_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    read = _Read(source, transform)
    num_threads = _num_threads(num_threads)
    shard = slice(process_index, None, process_count)
    steps = slice(start_step, None)
    # Grain's epoch e shuffles with seed + e; the hash above keeps the epochs of neighbouring seeds apart.
    rows = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat(None)
    if _decodes_once(decode_once, read, len(source)):
        arrays = _decode_all(read, len(source), num_threads)
        data = (
            rows[shard]
            .batch(local_batch_size, drop_remainder=True)[steps]
            .map(lambda rows: {k: v[rows] for k, v in arrays.items()})
        )
        return Batches(_start(data, num_threads=1, num_workers=0))
    # Random numbers are drawn before the shards part, so that they do not depend on the number of processes.
    data = rows.random_map(read, seed=transform_seed)[shard].batch(local_batch_size, drop_remainder=True)[steps]
    return Batches(_start(data, num_threads, num_workers))


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
) -> "EvalBatches":
    """Every example of a source exactly once, in order: a sized object that can be iterated again and again.

    All processes see the same number of full batches; what fills up the last ones has mask False and zeros elsewhere.
    The arguments are those of `train_batches`.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    import grain

    read = _Read(source, transform)
    num_threads = _num_threads(num_threads)
    num_batches = math.ceil(len(source) / batch_size)
    rows = grain.MapDataset.range(num_batches * batch_size)[process_index::process_count]
    if _decodes_once(decode_once, read, len(source)):
        padding = len(source)
        arrays = _decode_all(read, padding + 1, num_threads)
        data = rows.batch(local_batch_size, drop_remainder=True)
        data = data.map(lambda rows: {k: v[np.minimum(rows, padding)] for k, v in arrays.items()})
        return EvalBatches(data, num_batches, num_threads=1, num_workers=0)
    data = rows.map(lambda row: read(row, None)).batch(local_batch_size, drop_remainder=True)
    return EvalBatches(data, num_batches, num_threads, num_workers)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """The batches of one evaluation: `len` of them, at every iteration the same."""

    data: Any  # grain.MapDataset of batches
    num_batches: int
    num_threads: int
    num_workers: int

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> "Batches":
        return Batches(_start(self.data, self.num_threads, self.num_workers))


class Batches(Iterator[Batch]):
    """An iterator over batches that can be closed, and that stays broken once it broke.

    Grain's own iterators answer the call after an error with StopIteration or an unrelated error, which a loop would
    take for the end of the data.
    """

    def __init__(self, iterator: Any):
        self._iterator = [iterator]
        self._error: BaseException | None = None
        # Also called at exit, so that worker processes do not outlive us.
        self.close = weakref.finalize(self, lambda held: held.pop().close(), self._iterator)

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if not self._iterator:
            raise ValueError("these batches were closed")
        try:
            return next(self._iterator[0])
        except Exception as error:
            self._error = error
            raise


@dataclasses.dataclass
class _Read:
    """Reads, transforms and checks one example. Goes to the worker processes."""

    source: Source
    transform: Transform

    def __post_init__(self):
        if not len(self.source):
            raise ValueError(f"{self.source!r} is empty")
        self.label_shape: tuple[int, ...] = np.shape(self.source[0]["label"])
        self.image_shape: tuple[int, ...] | None = None
        self.image_shape = self(0, np.random.default_rng(0) if not self.deterministic else None)["image"].shape

    @property
    def deterministic(self) -> bool:
        return getattr(self.transform, "deterministic", False)

    def __call__(self, row: int, rng: np.random.Generator | None) -> Batch:
        if row >= len(self.source):
            assert self.image_shape is not None
            label_dtype = np.uint8 if self.label_shape else np.int32
            return _as_item(np.zeros(self.image_shape, np.uint8), np.zeros(self.label_shape, label_dtype), False)
        example = self.source[int(row)]
        label = self._checked_label(example)
        image = self.transform(example, rng)["image"]
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(
                f"{example['id']}: the transforms must give uint8 [h, w, c], found {image.dtype} {image.shape}"
            )
        if self.image_shape is not None and image.shape != self.image_shape:
            raise ValueError(
                f"{example['id']} has shape {image.shape} after the transforms, the first example {self.image_shape}: "
                "end the transforms with a resize or a crop to one size"
            )
        return _as_item(image, label, True)

    def _checked_label(self, example: Example) -> np.ndarray:
        label, num_classes = np.asarray(example["label"]), len(self.source.class_names)
        if label.shape != self.label_shape or label.ndim > 1:
            raise ValueError(f"{example['id']}: label has shape {label.shape}, the first one {self.label_shape}")
        if label.ndim == 1:
            if len(label) != num_classes or not np.isin(label, (0, 1)).all():
                raise ValueError(f"{example['id']}: expected {num_classes} zeros and ones as label, found {label}")
            return label.astype(np.uint8)
        if not 0 <= label < num_classes:
            raise ValueError(
                f"{example['id']}: label {label} is outside 0..{num_classes - 1} (there are {num_classes} classes)"
            )
        return label.astype(np.int32)


def _as_item(image: np.ndarray, label: np.ndarray, real: bool) -> Batch:
    return {"image": image, "label": label, "mask": np.asarray(real)}


def _decodes_once(decode_once: DecodeOnce, read: _Read, num_examples: int) -> bool:
    if decode_once == "auto":
        return read.deterministic and num_examples * math.prod(read.image_shape or ()) < DECODE_ONCE_BYTES
    if decode_once and not read.deterministic:
        raise ValueError("decode_once=True, but the transforms draw random numbers; use 'auto' or False")
    return bool(decode_once)


def _decode_all(read: _Read, num_rows: int, num_threads: int) -> Batch:
    first = read(0, None)
    arrays = {key: np.empty((num_rows, *value.shape), value.dtype) for key, value in first.items()}

    def fill(start: int) -> None:
        for row in range(start, min(start + 256, num_rows)):
            for key, value in read(row, None).items():
                arrays[key][row] = value

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(fill, range(0, num_rows, 256)):
            pass
    return arrays


def _start(data: Any, num_threads: int, num_workers: int) -> Any:
    import grain

    # An element is a whole batch: Grain's default would read 500 of them ahead.
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1))
    if num_workers:
        _mark_flags_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        data = data.mp_prefetch(options, worker_init_fn=_die_with_parent)
    return iter(data)


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is outside 0..{process_count - 1}")
    return batch_size // process_count


def _num_threads(num_threads: int | None) -> int:
    if num_threads is None:
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    return num_threads


def _mark_flags_as_parsed() -> None:
    """Grain reads an absl flag before it starts workers, which fails outside of `app.run` (pytest, notebooks)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _die_with_parent(worker_index: int, worker_count: int) -> None:
    """Ends a worker whose trainer was killed: nobody else does."""
    del worker_index, worker_count
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
