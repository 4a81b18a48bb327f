"""Several processes as one job, on JAX's own runtime (`jax.distributed`): they start, stop and end together.

start          connects the processes, before anything else uses JAX
StopTogether   a signal to any of them stops all of them after the same step
end_together   an error in one of them ends all of them within seconds
is_main, from_main, agreed   one process writes and decides; one that fails fails everywhere
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_flax.signals import EXIT_PREEMPTED, StopSignal

DETECTED = "Slurm, Open MPI, a TPU pod slice or Kubernetes"  # by `jax.distributed.initialize`
QUIET_SECS = 10  # a start that takes longer says what it waits for


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """How long processes wait for each other, in seconds.

    Attributes:
      start_secs: for all processes to be there; a queue may start them one after the other.
      heartbeat_secs: for a sign of life; then a process counts as dead, and all others end.
      shutdown_secs: at the end of the job, for the others to get there too.
    """

    start_secs: int = 300
    heartbeat_secs: int = 100
    shutdown_secs: int = 300


def start(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeouts: Timeouts | None = None,
) -> None:
    """Makes this process one of a job; returns when all of them are there. Without a coordinator it stands alone.

    Has to come before the first use of JAX's devices.

    Args:
      coordinator: "host:port" of process 0, with any free port; or "auto", to be found out from what started the job.
      num_processes: of the job; not with "auto".
      process_id: number of this one, from 0; not with "auto".
      timeouts: see there.

    Raises:
      ValueError: arguments that do not go together, or nothing was found out.
      RuntimeError: the connection failed.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ValueError("--num_processes and --process_id need --coordinator host:port.")
        return
    timeouts = timeouts or Timeouts()
    arguments = _arguments(coordinator, num_processes, process_id)
    if process_id is None:
        awaited = f"all processes of the job that was found out ({DETECTED})"
    elif process_id == 0:
        awaited = f"process 0 of {num_processes} waits on {coordinator} for the others to connect"
    else:
        awaited = (
            f"process {process_id} of {num_processes} waits for process 0 at {coordinator}, and for all to connect"
        )
    try:
        with _in_time(timeouts.start_secs, awaited):
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=timeouts.start_secs + 60,  # JAX's own limit ends the process with a C++ stack
                heartbeat_timeout_seconds=timeouts.heartbeat_secs,
                shutdown_timeout_seconds=timeouts.shutdown_secs,
            )
    except ValueError as error:
        raise ValueError(
            f"--coordinator auto found no sign of {DETECTED} ({error}): start the processes with one of these, or give "
            "--coordinator host:port, --num_processes and --process_id."
        ) from error


def _arguments(coordinator: str, num_processes: int | None, process_id: int | None) -> dict[str, Any]:
    """The part of the arguments of `jax.distributed.initialize` that says who is who."""
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise ValueError("--coordinator auto finds out --num_processes and --process_id: leave them out.")
        return {}
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator must be host:port or auto, got {coordinator!r}.")
    if num_processes is None or process_id is None:
        raise ValueError("--coordinator host:port needs --num_processes and --process_id, another one in each process.")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id must be at least 0 and below {num_processes=}, got {process_id}.")
    # JAX would bind to all network interfaces; its protocol knows no passwords.
    loopback = host in ("localhost", "[::1]") or host.startswith("127.")
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
        "coordinator_bind_address": coordinator if loopback else None,
    }


@contextlib.contextmanager
def _in_time(secs: int, awaited: str) -> Iterator[None]:
    """Says what is awaited if it takes long, and ends the process if it takes too long."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(min(QUIET_SECS, secs)):
            print(f"{awaited}; gives up after {secs} s ...", file=sys.stderr, flush=True)
        if not done.wait(max(secs - QUIET_SECS, 0)):
            print(
                f"error: {awaited}: not within {secs} s (--start_timeout_secs). Look whether all processes were "
                "started, with the same --coordinator, and whether its port is open to them.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def is_started() -> bool:
    """Whether this process is one of a job."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return jax.process_index() == 0


def from_main(value: Any) -> Any:
    """What process 0 gave, which has to be a JSON value; all processes have to call this."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, text.size)] = text[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


@contextlib.contextmanager
def agreed(doing: str) -> Iterator[None]:
    """What fails in one process fails in all. All have to come here, and inside they may not wait for each other.

    Raises: what was raised inside. OSError: another process could not do it.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = []
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.bool_(error is not None))).tolist()
    if error is not None:
        raise error
    if failed:
        raise OSError(f"{doing} failed in process {', '.join(map(str, failed))}")


def stop_signal() -> StopSignal:
    """How this process is asked to stop."""
    return StopTogether() if is_started() else StopSignal()


class StopTogether(StopSignal):
    """SIGTERM (or Ctrl-C) to any process stops all of them after the same step.

    JAX's preemption service has the handler of SIGTERM from `start` on. A handler that is set later takes its place
    without a word, so none is: Ctrl-C is turned into SIGTERM, and the second one ends the process at once.
    """

    def __enter__(self) -> "StopTogether":
        if threading.current_thread() is threading.main_thread():
            self._interrupted = False
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether all processes stop after this step; all have to ask after every step."""
        if self.received is None and multihost_utils.reached_preemption_sync_point(step):
            self.received = "SIGTERM"
        return self.received is not None

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if self._interrupted:
            os._exit(128 + number)
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends the process at once when it ends because of an error; does nothing where it stands alone.

    JAX lets a process that fails wait for the others before it exits, and they wait for it in the next exchange: five
    minutes, by default. The others end when they miss it.
    """
    try:
        yield
    except BaseException as error:
        if not is_started() or (isinstance(error, SystemExit) and error.code in ENDS_WELL):
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if not isinstance(error, SystemExit):
            traceback.print_exc()
            print(
                f"error: {who} ends because of the error above. If that speaks of a peer or a connection, another "
                "process ended first: its output says why.",
                file=sys.stderr,
            )
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


ENDS_WELL = (None, 0, EXIT_PREEMPTED)
