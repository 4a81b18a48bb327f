"""Where numbers go: the console, metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vit_flax.files import write_atomically


class Writer:
    """Writes scalars of a run.

    A resumed run goes on from its checkpoint; what an earlier life wrote beyond that step is taken back first, so that
    the file is what an uninterrupted run would have written.

    Args:
      workdir: of the run; None writes to the console only.
      start_step: the step that the run goes on from.
      total_steps: for the progress bar.
    """

    def __init__(self, workdir: Path | None, *, start_step: int, total_steps: int):
        # tensorboardX takes 0.7 s to import, which `vit_flax.main --help` and the dry run need not wait for.
        from tensorboardX import SummaryWriter

        self.console = Console()
        self._jsonl = self._board = None
        if workdir is not None:
            path = workdir / "metrics.jsonl"
            if path.exists():
                write_atomically(path, "".join(_lines_until(path, start_step)))
            self._jsonl = open(path, "a", buffering=1)  # noqa: SIM115  (closed by __exit__)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=start_step, text="compiling")
            self._progress.start()
        self._total_steps = total_steps

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line of scalars to the files; values that are not finite become null there."""
        clean = {k: (float(v) if math.isfinite(v) else None) for k, v in scalars.items()}
        if self._jsonl is not None:
            self._jsonl.write(json.dumps({"step": step, **clean}) + "\n")
        if self._board is not None:
            for name, value in clean.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Prints a line (above the progress bar where there is one)."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(self, step: int, text: str) -> None:
        """Moves the progress bar; on a plain console, prints a line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        else:
            self.say(f"step {step}/{self._total_steps} {text}")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """Flushes everything and takes the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._board is not None:
            self._board.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file up to a step; a line cut short by a kill is left out."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class TrainLog:
    """Averages what the steps return over `every_steps` steps, and adds throughput.

    The numbers of an interval are fetched only once the step after it has been dispatched, so the device never waits.

    Args:
      writer: receives them under "train/".
      every_steps: length of an interval.
      batch_size: images per step, over all processes.
      total_steps: of the run.
    """

    def __init__(self, writer: Writer, *, every_steps: int, batch_size: int, total_steps: int):
        self._writer, self._every, self._batch, self._total = writer, every_steps, batch_size, total_steps
        self._interval: list[dict[str, Any]] = []
        self._replayed = 0
        self._due: tuple[int, list[dict[str, Any]], float] | None = None
        self._since = time.perf_counter()
        self._waited_secs = 0.0
        self.last: dict[str, float] = {}

    def replay(self, interval: list[dict[str, Any]]) -> None:
        """Takes the metrics of the steps since the last interval, which an earlier process made."""
        self._interval, self._replayed = list(interval), len(interval)

    def __call__(self, step: int, metrics: dict[str, jax.Array], waited_secs: float) -> None:
        """Takes the metrics of a step (on the device) and the time its batch was waited for."""
        self.flush()
        self._interval.append(metrics)
        self._waited_secs += waited_secs
        if step % self._every == 0 or step == self._total:
            self._due = (step, self._interval, self._waited_secs)
            self._interval, self._waited_secs = [], 0.0

    def flush(self) -> None:
        """Fetches and writes an interval that is complete."""
        if self._due is None:
            return
        (step, interval, waited), self._due = self._due, None
        values = jax.device_get(interval)
        secs = max(time.perf_counter() - self._since, 1e-9)
        self._since = time.perf_counter()
        means = {k: float(np.mean([v[k] for v in values], dtype=np.float64)) for k in values[0]}
        means["images_per_sec"] = (len(values) - self._replayed) * self._batch / secs
        self._replayed = 0
        means["data_wait_percent"] = 100 * min(waited / secs, 1.0)
        self.last = means
        self._writer.write(step, {f"train/{k}": v for k, v in means.items()})
        self._writer.progress(
            step,
            f"loss {means['loss']:.4f}  accuracy {means.get('top1', math.nan):.3f}  "
            f"{means['images_per_sec']:,.0f} img/s  data wait {means['data_wait_percent']:.0f}%",
        )

    def exclude(self, secs: float) -> None:
        """Leaves time spent on something else, such as an evaluation, out of the throughput."""
        self._since += secs


def print_results(console: Console, results: Mapping[str, float], places: Mapping[str, Path]) -> None:
    """The table at the end of a run: numbers, and where everything is (paths whole, however narrow the console)."""
    numbers = {k: f"{v:,.4g}" if abs(v) >= 1000 or 0 < abs(v) < 1e-3 else f"{v:.4f}" for k, v in results.items()}
    rows = numbers | {name: str(path) for name, path in places.items()}
    width = max(map(len, rows))
    for name, text in rows.items():
        console.print(f"{name:<{width}}  {text}", highlight=False, markup=False, soft_wrap=True)
    sys.stdout.flush()
