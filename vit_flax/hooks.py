"""What happens between steps: things that are due every so often, and the profiler."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_flax.step import TrainState

Hook = Callable[..., None]


class Every:
    """Calls `action(step, state)` when it is due, and always after the last step: the one schedule of a run.

    A run that goes on from step s has done what was due at s in its earlier life, and does not do it again.

    Args:
      action: what to do.
      total_steps: number of the last step.
      every_steps: due after every multiple of this; 0 or None: not by steps. Epochs become steps in `config.in_steps`.
      every_secs: due so many seconds after it was last done (after the start, the first time); None: not by time.
      clock: seconds that only grow.

    Raises: ValueError: both or a negative distance; seconds with several processes, whose clocks differ.
    """

    def __init__(
        self,
        action: Callable[[int, TrainState], Any],
        *,
        total_steps: int,
        every_steps: int | None = None,
        every_secs: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if every_steps and every_secs:
            raise ValueError(f"{every_steps=} and {every_secs=}: give one of them.")
        if (every_steps or 0) < 0 or (every_secs or 0) < 0:
            raise ValueError(f"{every_steps=}, {every_secs=}: a distance cannot be negative.")
        if every_secs and jax.process_count() > 1:
            raise ValueError(f"{every_secs=} needs a single process, as the clocks of several differ: use every_steps.")
        self._action, self._total = action, total_steps
        self._steps, self._secs, self._clock = every_steps, every_secs, clock
        self._done_at = clock()

    def is_due(self, step: int) -> bool:
        """Whether the action is due after this step."""
        if step == self._total:
            return True
        if self._secs:
            return self._clock() - self._done_at >= self._secs
        return bool(self._steps) and step % self._steps == 0

    def __call__(self, step: int, state: TrainState) -> None:
        """Acts if this step is due."""
        if self.is_due(step):
            self.now(step, state)

    def now(self, step: int, state: TrainState) -> None:
        """Acts, whether this step is due or not."""
        self._action(step, state)
        self._done_at = self._clock()


def check_profile_steps(steps: Sequence[int], total_steps: int) -> None:
    """Raises ValueError for steps that cannot be traced; the first step of a run compiles."""
    if len(steps) != 2 or not 2 <= steps[0] <= steps[1] <= total_steps:
        raise ValueError(
            f"profile_steps={tuple(steps)}: expected (first, last) with 2 <= first <= last <= {total_steps}, the "
            "number of steps. Step 1 compiles and cannot be traced."
        )


class Profile:
    """Records a trace of the profiler of the steps first to last, for Perfetto or for XProf in TensorBoard.

    Goes before the other hooks, so that what is due after the last traced step is not in the trace.

    Args:
      steps: number of the first and of the last traced step; see `check_profile_steps`.
      folder: receives the trace.
      say: prints a line.
    """

    def __init__(self, steps: Sequence[int], *, folder: Path, say: Callable[[str], None]):
        (self._first, self._last), self._folder, self._say = steps, folder, say
        self._running = False

    def __call__(self, step: int, state: TrainState) -> None:
        """Starts before the first step that is traced, and stops after the last."""
        if not self._running and self._first - 1 <= step < self._last:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(str(self._folder))
            self._running, self._since = True, step + 1
        elif self._running and step >= self._last:
            jax.block_until_ready(state.step)
            self.close()
            self._say(f"A trace of steps {self._since} to {step} is in {self._folder}.")

    def close(self) -> None:
        """Ends a trace that is still running; what it has is written."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
