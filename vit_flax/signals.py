"""SIGTERM and SIGINT: how a run is asked to stop, and what it does about it.

Imports next to nothing, so that the handlers are there before the slow imports are.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

# sysexits.h: "temporary failure, try again". A launcher may restart on this code and only on this.
EXIT_PREEMPTED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Item = TypeVar("Item")


def exit_on_signals() -> None:
    """From here on, and until a `StopSignal` takes over, a signal to stop ends the process with `EXIT_PREEMPTED`."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(EXIT_PREEMPTED))


class Interrupted(Exception):
    """An evaluation was left because of a signal to stop."""


class StopSignal:
    """SIGTERM and SIGINT ask the run to save and stop; the second one ends the process at once.

    Until `hold` is called there is nothing to save, and the first signal ends the process with `EXIT_PREEMPTED`. After
    it, the first signal only sets `received`; the loop looks at it after each step.

    Signals reach the main thread only; elsewhere (a notebook's worker, a test) this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._held = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers only between its own instructions, so not while XLA compiles. The number of a signal
            # reaches this pipe at once, and the thread at its end.
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous_fd = signal.set_wakeup_fd(self._write)
            threading.Thread(target=_exit_on_the_second, args=(read,), daemon=True).start()
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._write)
        if self.received and not self._held:
            print(f"Stopped by {self.received} before the first step; nothing was lost.", file=sys.stderr)

    def hold(self) -> None:
        """From here on there is something to save."""
        self._held = True

    def reached(self, step: int) -> bool:
        """Whether the run stops after this step."""
        del step  # where several processes have to agree, it counts
        return self.received is not None

    def until_received(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until a signal comes. Raises Interrupted."""
        for item in items:
            if self.received:
                raise Interrupted
            yield item

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self._held:
            raise SystemExit(EXIT_PREEMPTED)


def _exit_on_the_second(read: int) -> None:
    received = 0
    while number := os.read(read, 1):
        if number[0] in STOP_SIGNALS:
            received += 1
        if received == 2:
            os._exit(128 + number[0])
    os.close(read)
