"""What happens between steps: things that are due every so often, and signals to stop."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from vit_flax.step import TrainState

# sysexits.h: "temporary failure, try again". A launcher may restart on this code and only on this.
EXIT_PREEMPTED = 75

Hook = Callable[..., None]


class Every:
    """Calls `action(step, state)` after every so many steps, and after the last one.

    Args:
      action: what to do.
      every_steps: 0 or None means only after the last step.
      total_steps: number of the last step.
    """

    def __init__(self, action: Callable[[int, TrainState], Any], *, every_steps: int | None, total_steps: int):
        self._action, self._every, self._total = action, every_steps, total_steps

    def __call__(self, step: int, state: TrainState) -> None:
        """Acts if this step is due."""
        if step == self._total or (self._every and step % self._every == 0):
            self._action(step, state)


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the running step; the second one ends the process at once.

    Signals reach the main thread only; elsewhere (a notebook's worker, a test) this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
