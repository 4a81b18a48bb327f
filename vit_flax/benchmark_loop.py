"""What the training loop costs beside the jitted step: logging and hooks, and, apart from them, fetching batches.

    python -m vit_flax.benchmark_loop --config configs/digits.py [--step_ms 20] [--windows 30]

One real run, with its files and TensorBoard, in windows of equal length that take turns, so that a noisy machine hits
all alike: bare steps (the compiled step of the run on one fixed batch, and nothing else); the loop on that same batch;
the loop on the batches of the input pipeline. The batch size of the config is scaled until a bare step takes
`--step_ms`. Evaluations and checkpoints are hooks that are not due inside the windows. Prints one JSON line.
"""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from vit_flax.cache import enable_compilation_cache
from vit_flax.config import plain
from vit_flax.data import Ahead
from vit_flax.gpu_flags import set_gpu_flags
from vit_flax.job import Job, build
from vit_flax.log_lines import show_warnings
from vit_flax.signals import StopSignal
from vit_flax.trainer import train_job

WARMUP_STEPS = 10


Spent = tuple[float, float]  # seconds of the clock, CPU seconds of the process


class Turns:
    """Lets a run take turns with bare steps, and times all of them.

    Attributes:
      spent: kind of window ("bare", "loop", "loop_and_input") -> what each window took.
    """

    def __init__(self, windows: int, steps: int):
        self._windows, self._steps = windows, steps
        self._state: Any = None
        self._batch: dict[str, jax.Array] = {}
        self._metrics: dict[str, jax.Array] = {}
        self.spent: dict[str, list[Spent]] = {"bare": [], "loop": [], "loop_and_input": []}

    def wrap_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, which keeps a copy of the first state and batch for the bare steps."""
        self._step = step

        def wrapped(state: Any, batch: dict[str, jax.Array]) -> Any:
            if self._state is None:
                self._state, self._batch = jax.tree.map(jnp.copy, (state, batch))
            state, self._metrics = step(state, batch)
            return state, self._metrics

        return wrapped

    def wrap_batches(self, batches: Iterator[dict[str, jax.Array]]) -> Iterator[dict[str, jax.Array]]:
        """The batches; the loop asks for the next one only when a window is over, and bare steps run meanwhile."""
        for _ in range(WARMUP_STEPS):
            yield next(batches)
        for _ in range(self._windows):
            with self._timed("bare"):
                for _ in range(self._steps):
                    self._state, self._metrics = self._step(self._state, self._batch)
            with self._timed("loop"):
                for _ in range(self._steps):
                    yield self._batch
            with self._timed("loop_and_input"):
                for _ in range(self._steps):
                    yield next(batches)
        yield from batches

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        jax.block_until_ready(self._metrics)
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        jax.block_until_ready(self._metrics)
        self.spent[kind].append((time.perf_counter() - clock, time.process_time() - cpu))


class TimedBatches(Iterator[dict[str, jax.Array]]):
    """Batches that take turns with bare steps; what they count is counted as before."""

    def __init__(self, turns: Turns, batches: Ahead):
        self._batches, self._turns = batches, turns.wrap_batches(batches)

    def __next__(self) -> dict[str, jax.Array]:
        return next(self._turns)

    @property
    def counts(self) -> dict[str, Any]:
        """As `Ahead.counts`."""
        return self._batches.counts


@dataclasses.dataclass(frozen=True)
class TimedJob(Job):
    """A job whose steps and batches go through `turns`."""

    turns: Turns

    def train_step(self) -> Callable[..., Any]:
        """As `Job.train_step`."""
        return self.turns.wrap_step(super().train_step())

    def train_batches(self, start_step: int) -> Any:
        """As `Job.train_batches`."""
        return TimedBatches(self.turns, super().train_batches(start_step))


def measure(config: dict[str, Any], *, windows: int, steps: int, log_every_steps: int) -> dict[str, Any]:
    """Times a run of a config against its own bare steps.

    Args:
      config: nested dicts; durations, evaluations and checkpoints are replaced.
      windows: of each kind.
      steps: of a window.
      log_every_steps: of the run.

    Returns: milliseconds per bare step, and what the other windows took more, in percent of it: by the clock, median
      and quartiles over the turns; by CPU time, which other programs on the machine change less.
    """
    total = WARMUP_STEPS + 2 * windows * steps + 1  # one more, so that the last window is over before the end is due
    run = {k: v for k, v in config["run"].items() if k.rpartition("_")[0] not in ("total", "log_every")}
    optim = {k: v for k, v in config["optim"].items() if not k.endswith(("_epochs", "_steps"))}
    evals = {name: {"type": section["type"], "every_steps": 0} for name, section in config["evals"].items()}
    changed = {"optim": optim, "evals": evals, "checkpoint": {"every_steps": 0}}
    job = build(config | changed | {"run": run | {"total_steps": total, "log_every_steps": log_every_steps}})
    turns = Turns(windows, steps)
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(Job)}
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        train_job(TimedJob(**fields, turns=turns), folder, stop)
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "batch_size": config["data"]["batch_size"],
        "windows": windows,
        "steps_per_window": steps,
        "log_every_steps": log_every_steps,
        "bare_step_ms": round(1e3 * statistics.median(clock for clock, _ in turns.spent["bare"]) / steps, 2),
    }
    for kind in ("loop", "loop_and_input"):
        pairs = list(zip(turns.spent[kind], turns.spent["bare"], strict=True))
        clock, cpu = ([100 * (spent[i] / bare[i] - 1) for spent, bare in pairs] for i in (0, 1))
        result[f"{kind}_percent"] = round(statistics.median(clock), 2)
        result[f"{kind}_percent_quartiles"] = [round(q, 2) for q in statistics.quantiles(clock, n=4)[::2]]
        result[f"{kind}_cpu_percent"] = round(statistics.median(cpu), 2)
        extra = [1e6 * (spent[1] - bare[1]) / steps for spent, bare in pairs]
        result[f"{kind}_cpu_us_per_step"] = round(statistics.median(extra))
    return result


def main(_: list[str]) -> None:
    """Finds the batch size, measures, prints."""
    set_gpu_flags()
    show_warnings()
    enable_compilation_cache()
    given, config = flags.FLAGS, plain(flags.FLAGS.config)
    trial = measure(config, windows=3, steps=10, log_every_steps=10)
    scaled = config["data"]["batch_size"] * given.step_ms / trial["bare_step_ms"]
    batch_size = max(1, round(scaled / jax.device_count())) * jax.device_count()
    config = config | {"data": config["data"] | {"batch_size": batch_size}}
    print(json.dumps(measure(config, windows=given.windows, steps=given.steps, log_every_steps=given.log_every_steps)))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/digits.py", "The experiment.")
    flags.DEFINE_float("step_ms", 20.0, "Time that a bare step should take; the batch size follows.")
    flags.DEFINE_integer("windows", 40, "Windows of each kind.")
    flags.DEFINE_integer("steps", 25, "Steps of a window.")
    flags.DEFINE_integer("log_every_steps", 25, "Steps between two lines of the log.")
    app.run(main)
