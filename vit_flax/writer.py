"""Where numbers go: the console, and every sink of the run."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vit_flax.console import RunConsole
from vit_flax.param_groups import ParameterGroup
from vit_flax.sinks import EXTRAS, Sink


class Writer:
    """Writes what a run has to say: lines to the console, numbers and pictures to the sinks.

    Of several processes only the first one writes.

    Args:
      workdir: of the run; None where nothing is written down.
      sinks: makers of the sinks by name; none for the console only. They are called, and may raise, before anything
        is written.
      start_step: the step that the run goes on from.
      total_steps: for the progress bar.
      quiet: says nothing on the console.
    """

    def __init__(
        self,
        workdir: Path | None,
        sinks: Mapping[str, Callable[[], Sink]],
        *,
        start_step: int,
        total_steps: int,
        quiet: bool = False,
    ):
        self.workdir, self.start_step = workdir, start_step
        self.active = jax.process_index() == 0
        self.console = RunConsole(quiet=quiet or not self.active)
        self._sinks: dict[str, Sink] = {}
        with ExitStack() as opened:  # closes those that are open when another cannot be opened
            for name, make in sinks.items() if self.active else ():
                self._sinks[name] = sink = make()
                opened.callback(self._attempt, name, sink.close)
            self.closing = opened.pop_all()
        self._total_steps = total_steps
        self._progress: Progress | None = None
        if self.console.is_terminal and not self.console.quiet:
            self._progress = progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = progress.add_task("", total=total_steps, completed=start_step, text="compiling")
            progress.start()
            self.closing.callback(progress.stop)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step; those that are not finite become None."""
        clean = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self._each("scalars", step, clean)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 [h, w, c]."""
        self._each("picture", step, name, image)

    def finish(self, results: Mapping[str, float]) -> None:
        """Tells the sinks that the run went through to its end."""
        finite = {name: value for name, value in results.items() if math.isfinite(value)}
        self._each("finish", finite)

    def _each(self, method: str, *arguments: Any) -> None:
        for name, sink in list(self._sinks.items()):
            self._attempt(name, getattr(sink, method), *arguments)

    def _attempt(self, name: str, write: Callable[..., None], *arguments: Any) -> None:
        try:
            write(*arguments)
        except Exception as error:
            if name not in EXTRAS:
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(self.workdir)  # a full disk does not say which one it is
                raise
            # A server that is away must not end a run; the files are complete.
            self._sinks.pop(name, None)
            self.say(f"{name} failed and gets nothing more from this run ({type(error).__name__}: {error}).")

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
        """Closes everything that was opened, the newest first."""
        self.closing.close()


def print_groups(console: Console, groups: Sequence[ParameterGroup]) -> None:
    """The parameters by how they are treated, one line a group (whole, however narrow the console)."""
    rows: list[tuple[str, ...]] = [("parameters", "layers", "number", "lr x", "weight decay")]
    for group in groups:
        low, high = (f"{factor:.3g}" for factor in group.lr_factor)
        lr_factor = low if low == high else f"{low} to {high}"
        treated = ("frozen", "") if group.frozen else (lr_factor, f"{group.weight_decay:g}")
        rows.append((group.pattern, group.layers, f"{group.num_parameters:,}", *treated))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell.rjust(width) if i == 2 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        console.print("  ".join(cells).rstrip(), highlight=False, markup=False, soft_wrap=True)


def as_text(name: str, value: float) -> str:
    """A number for people: "0.9833", "1,317", "3.94e-05"; steps and counts whole."""
    if name.endswith(("step", "count")):
        return f"{value:,.0f}"
    return f"{value:,.4g}" if abs(value) >= 1000 or 0 < abs(value) < 1e-3 else f"{value:.4f}"


def print_results(console: Console, results: Mapping[str, float], places: Mapping[str, Path]) -> None:
    """The table at the end of a run: numbers, and where everything is (paths whole, however narrow the console)."""
    shown = {k: v for k, v in results.items() if k.count("/") < 2}  # without the norms of each layer
    rows = {name: as_text(name, value) for name, value in shown.items()} | {
        name: str(path) for name, path in places.items() if path.exists()
    }
    width = max(map(len, rows))
    for name, text in rows.items():
        console.print(f"{name:<{width}}  {text}", highlight=False, markup=False, soft_wrap=True)
    sys.stdout.flush()
