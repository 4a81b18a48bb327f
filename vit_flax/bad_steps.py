"""Steps whose loss, gradient or update was not finite: `train_step` changes nothing, and this decides what follows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_flax.sharding import local_rows
from vit_flax.typing import Array


class Diverged(FloatingPointError):
    """Too many steps in a row were not finite."""


class BadSteps:
    """Reports bad steps, keeps their batches where wanted, and ends the run after too many in a row.

    Looks at the step before the one that was just dispatched, so the device never waits for the host.

    Args:
      max_in_a_row: so many end the run.
      folder: receives the batches, as `step_<number>.npz`.
      max_dumps: keeps at most so many batches; 0 for none.
      say: prints a line.
    """

    def __init__(self, *, max_in_a_row: int, folder: Path, max_dumps: int, say: Callable[[str], None]):
        self._max_in_a_row, self._folder, self._dumps_left, self._say = max_in_a_row, folder, max_dumps, say
        self._dumping = max_dumps > 0
        self._last: tuple[int, Mapping[str, Array], dict[str, Array], Array] | None = None

    def __call__(self, step: int, batch: Mapping[str, Array], metrics: dict[str, Array]) -> None:
        """Takes a step, and looks at the one before. Raises Diverged."""
        self.flush()
        batch = batch if self._dumps_left else {}  # else its memory is free for the next one
        self._last = (step, batch, metrics, metrics.pop("skipped_in_a_row"))

    def flush(self) -> None:
        """Looks at the last step. Raises Diverged."""
        if self._last is None:
            return
        (step, batch, metrics, skipped), self._last = self._last, None
        in_a_row = int(skipped)
        if in_a_row == 0:
            return
        numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm", "update_norm", "param_norm")}
        reason = ", ".join(f"{name} {value:g}" for name, value in numbers.items() if not np.isfinite(value))
        self._say(f"Step {step} changed nothing: {reason} ({in_a_row} in a row).")
        if self._dumps_left:
            self._dumps_left -= 1
            self._dump(step, batch)
        if in_a_row >= self._max_in_a_row:
            raise Diverged(
                f"{in_a_row} steps in a row, up to step {step}, were not finite ({reason}), and changed nothing.\n"
                "Lower optim.lr or optim.clip_norm, in another --workdir, or look at the data. "
                + (
                    f"The batches are in {self._folder}: numpy.load(file)['image']."
                    if self._dumping
                    else "run.dump_bad_batches=3 keeps three of the batches."
                )
            )

    def _dump(self, step: int, batch: Mapping[str, Array]) -> None:
        self._folder.mkdir(exist_ok=True)
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        arrays: dict[str, Any] = {name: local_rows(x) for name, x in batch.items()}
        np.savez(self._folder / f"step_{step}{process}.npz", **arrays)
