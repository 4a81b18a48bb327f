"""What the steps return, averaged over intervals (of what is finite) and written with the speed of the run.

The numbers of an interval are fetched only once the step after it has been dispatched, so the device never waits for
the host. An interval that a checkpoint falls into is kept with it, so that a run which goes on from there writes the
numbers of an uninterrupted one.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vit_flax.typing import ArrayLike
from vit_flax.writer import Writer

# Numbers that depend on the clock or the machine: everything else is equal, bit for bit, in a resumed run.
CLOCK = tuple(f"train/{name}" for name in ("images_per_sec", "data_wait_percent", "mfu_percent", "device_memory_gib"))


class TrainLog:
    """Averages what the steps return over `every_steps` steps, and adds learning rate and speed.

    Args:
      writer: receives the numbers under "train/".
      every_steps: length of an interval.
      batch_size: images per step, over all processes.
      total_steps: of the run.
      start_step: the step that the run goes on from.
      open_interval: what `open_interval` returned at the checkpoint of that step; empty at the start.
      last: the numbers of the interval before, as in `TrainLog.last`; empty at the start.
      learning_rates: of each step of the run.
      mfu_per_image_per_sec: part of the devices' peak that one image per second takes; None where no peak is known.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        every_steps: int,
        batch_size: int,
        total_steps: int,
        start_step: int,
        open_interval: Mapping[str, Any],
        last: dict[str, float],
        learning_rates: np.ndarray,
        mfu_per_image_per_sec: float | None,
    ):
        self._writer, self._every, self._batch, self._total = writer, every_steps, batch_size, total_steps
        self._start, self._lr = start_step, learning_rates
        self._mfu_per_rate = mfu_per_image_per_sec
        # Name -> sum of the finite values, and how many there were.
        self._sums: dict[str, tuple[float, int]] = {k: tuple(v) for k, v in open_interval.items()}
        self._timed = 0
        self._fetch_later: list[Mapping[str, ArrayLike]] = []
        self._due: int | None = None
        self._waited_secs = 0.0
        self._since: float | None = None
        self.last = last

    def __call__(self, step: int, metrics: Mapping[str, ArrayLike], waited_secs: float) -> None:
        """Takes the metrics of a step (on the device, or fetched) and the time its batch was waited for."""
        self.flush()
        if self._since is not None:
            self._waited_secs += waited_secs
        self.begin()
        self._fetch_later.append(metrics)
        self._timed += 1
        if step % self._every == 0 or step == self._total:
            self._due = step

    def begin(self) -> None:
        """Starts the clock, once: the first step has been dispatched, and nothing is compiled from here on."""
        if self._since is None:
            self._since = self._began = time.perf_counter()

    def flush(self) -> None:
        """Fetches and writes an interval that is complete."""
        if self._due is None or self._since is None:
            return
        step = self._due
        self._fetch()
        now = time.perf_counter()
        secs, self._since = max(now - self._since, 1e-9), now
        means = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        speed = self._speed(self._timed * self._batch / secs, secs)
        self.last = {**means, "lr": float(self._lr[step - 1]), **speed}
        self._writer.write(step, {f"train/{name}": value for name, value in self.last.items()})
        self._due = None  # from here on no checkpoint has to carry it
        self._sums, self._timed, self._waited_secs = {}, 0, 0.0
        self._writer.progress(step, self._line(step, now))

    def open_interval(self) -> dict[str, Any]:
        """The steps since the last line, for the process that goes on from here; JSON values."""
        self.flush()
        self._fetch()
        return dict(self._sums)

    def exclude(self, secs: float) -> None:
        """Leaves time spent on something else, such as an evaluation, out of the throughput."""
        if self._since is not None:
            self._since += secs

    def _fetch(self) -> None:
        """Adds the steps that are still on the device to the sums."""
        values: list[Mapping[str, Any]] = jax.device_get(self._fetch_later)
        self._fetch_later = []
        for step in values:
            for name, value in step.items():
                total, count = self._sums.get(name, (0.0, 0))
                # Where the loss is not finite the step changed nothing, and is reported apart.
                self._sums[name] = (total + float(value), count + 1) if math.isfinite(value) else (total, count)

    def _speed(self, images_per_sec: float, secs: float) -> dict[str, float]:
        speed = {
            "images_per_sec": images_per_sec,
            "data_wait_percent": 100 * min(self._waited_secs / secs, 1.0),
        }
        if self._mfu_per_rate is not None:
            speed["mfu_percent"] = 100 * images_per_sec * self._mfu_per_rate
        return speed | device_memory()

    def _line(self, step: int, now: float) -> str:
        last = self.last
        left = (self._total - step) * (now - self._began) / max(step - self._start, 1)
        parts = [
            f"loss {last['loss']:.4f}",
            *([f"top1 {last['top1']:.3f}"] if "top1" in last else []),
            f"{last['images_per_sec']:,.0f} img/s",
            *([f"MFU {last['mfu_percent']:.1f}%"] if "mfu_percent" in last else []),
            f"data wait {last['data_wait_percent']:.0f}%",
            f"{duration(left)} left",
        ]
        return "  ".join(parts)


def device_memory() -> dict[str, float]:
    """The largest memory in use so far on this process's first device; empty where the backend does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"device_memory_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def duration(secs: float) -> str:
    """Seconds as a person would say them, such as "1h 05m" or "40s"."""
    if not math.isfinite(secs):
        return "?"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"
