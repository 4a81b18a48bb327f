"""Threads and worker processes: how many, how much they read ahead, and how they end."""

import atexit
import functools
import gc
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from absl import logging

MAX_THREADS = 16
READ_AHEAD_BYTES = 2**32  # of this process, with the default number of threads
BATCHES_PER_WORKER = 2  # finished batches that wait in each worker process
SHARED_MEMORY = Path("/dev/shm")
FREEING_SECS = 0.3  # at the end of a process that had workers


def start(batches: Any, *, num_threads: int | None, num_workers: int, batch_bytes: int) -> Any:
    """Starts to read a `grain.MapDataset` of batches, and returns its iterator.

    Args:
      batches: the data set.
      num_threads: threads of this process, or of each worker. Each builds one batch at a time, and one more batch is
        read ahead. None: one per core that is there for it, at most 16 and not more than 4 GiB of batches.
      num_workers: worker processes; 0 for none.
      batch_bytes: size of a batch.
    """
    import grain

    if num_threads is None:
        num_threads = default_threads(num_workers, batch_bytes)
    # An element is a whole batch: Grain's default would read 500 of them ahead.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)
    data = batches.to_iter_dataset(options)
    if num_workers:
        _mark_flags_as_parsed()
        _collect_at_exit()
        if not fits_shared_memory(num_workers, batch_bytes):
            logging.warning("%s is too small for %d workers; batches go through pipes", SHARED_MEMORY, num_workers)
            never = grain.experimental.DatasetOptions(min_shm_size=2**62)
            data = grain.experimental.WithOptionsIterDataset(data, never)
        data = data.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=BATCHES_PER_WORKER),
            worker_init_fn=lambda index, count: die_with_parent(),
        )
    return iter(data)


def default_threads(num_workers: int, batch_bytes: int) -> int:
    """Threads per process: one per core, as long as their batches fit the memory for reading ahead."""
    processes = max(num_workers, 1)
    affordable = READ_AHEAD_BYTES // (processes * max(batch_bytes, 1)) - 1
    return max(1, min(num_cores() // processes, MAX_THREADS, affordable))


def num_cores() -> int:
    """Cores that this process may use, which containers and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fits_shared_memory(num_workers: int, batch_bytes: int) -> bool:
    """Whether the batches in flight fit /dev/shm; containers often limit it to 64 MB, and the worker dies of SIGBUS."""
    if not SHARED_MEMORY.exists():
        return True
    in_flight = BATCHES_PER_WORKER + 2  # those that wait, one being written, one being used
    return num_workers * in_flight * batch_bytes < shutil.disk_usage(SHARED_MEMORY).free


def _mark_flags_as_parsed() -> None:
    """Grain reads an absl flag before it starts workers, which fails outside of `app.run` (pytest, notebooks)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@functools.cache
def _collect_at_exit() -> None:
    """Has garbage collected once more when this process ends, and gives Grain's threads a moment to free it.

    JAX keeps a batch that it shares memory with until then, and Python would report its shared memory as leaked.
    """
    atexit.register(lambda: (gc.collect(), time.sleep(FREEING_SECS)))


def die_with_parent() -> None:
    """Called in a worker process: ends it when the process that started it was killed. Nobody else does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # returns at once if it is dead already
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
