"""Running the points of a sweep, one after another or many at once, each in a process of its own.

Every point has a folder `points/NAME` below the sweep's, which is an ordinary workdir of `train`, and a `result.json`
in it once it has ended. A sweep that is started again keeps what is done, lets half-finished points go on and tries
failed ones again.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vit_flax.config import ConfigError, flatten
from vit_flax.files import as_json, write_atomically
from vit_flax.signals import EXIT_PREEMPTED, exit_on_signals
from vit_flax.sweep.points import Point, Sweep

LAUNCHERS = ("local", "slurm")
RESULT = "result.json"
TIME_IS_UP = signal.SIGUSR2  # submitit and Slurm send it before the time limit, and when a job is preempted


@dataclass(frozen=True)
class Task:
    """What one process does: trains a point, to its end or until after the step `stop_after`."""

    point: Point
    stop_after: int | None = None


@runtime_checkable
class Plan(Protocol):
    """What runs next.

    Attributes:
      points: all that it has chosen so far.
      finished: nothing is left to do, in a later life neither.
    """

    @property
    def points(self) -> tuple[Point, ...]: ...

    @property
    def finished(self) -> bool: ...

    def next(self) -> Task | None:
        """To start now; None if nothing is left, or if that depends on tasks that are running."""
        ...

    def ended(self, task: Task, result: Mapping[str, Any] | None) -> str:
        """Takes note of a result (see `run_point`; None: a signal stopped it); returns its label, such as "[3/24]"."""
        ...


class Each:
    """Every point that is not done, once, in their order."""

    def __init__(self, points: tuple[Point, ...], workdir: Path):
        self.points, self._workdir = points, workdir
        self._waiting = list(_not_done(workdir, points))
        self._count, self._ended = len(self._waiting), 0

    @property
    def finished(self) -> bool:
        """Whether every point is done."""
        return not _not_done(self._workdir, self.points)

    def next(self) -> Task | None:
        """The next point."""
        return Task(self._waiting.pop(0)) if self._waiting else None

    def ended(self, task: Task, result: Mapping[str, Any] | None) -> str:
        """Counts."""
        self._ended += 1
        return f"[{self._ended}/{self._count}]"


def run(
    plan: Plan,
    workdir: Path,
    *,
    jobs: int,
    launcher: str,
    launcher_options: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> None:
    """Runs what the plan says, at most `jobs` tasks at a time, each in a process of its own.

    An error or a signal to stop (as the exception that its handler raises) ends the tasks first: they save, and go on
    from there when the sweep is started again.

    Args:
      plan: what to run.
      workdir: of the sweep.
      jobs: how many run at once.
      launcher: "local" or "slurm".
      launcher_options: parameters of submitit, such as {"slurm_partition": "gpu", "gpus_per_node": 1}.
      say: takes a line about each task that ends.

    Raises: ConfigError: CUDA_VISIBLE_DEVICES has fewer GPUs than the tasks need.
      ModuleNotFoundError: submitit is not installed; says how to.
    """
    free = _gpus(launcher, launcher_options, jobs)
    executor = _executor(workdir, launcher, launcher_options)
    running: dict[Any, tuple[Task, str]] = {}
    try:
        while True:
            while len(running) < jobs and (task := plan.next()) is not None:
                gpus = free.pop(0)
                with _ignoring_ctrl_c():
                    running[executor.submit(_run_task, task, str(workdir), gpus)] = task, gpus
            if not running:
                return
            for job in [job for job in running if job.done()]:
                task, gpus = running.pop(job)
                free.append(gpus)
                result = _settle(job, task.point, workdir)
                say(f"{plan.ended(task, result)} {task.point.name}: {_outcome(result)}")
            time.sleep(0.2)
    finally:
        _cancel(running, launcher, say)


def run_point(point: Point, workdir: Path, *, stop_after: int | None = None) -> dict[str, Any]:
    """Trains one point, in this process, and notes its result; an error is noted, not raised.

    Args:
      point: to train, or to go on with.
      workdir: of the sweep.
      stop_after: see `train`; the result then has the status "stopped", and its metrics under `rungs`, too.

    Returns: the result: `status` ("done", "stopped" or "failed"), `step`, `metrics`, `secs`, `error`, `rungs`.

    Raises: InUse: another process trains it, and will note its result.
    """
    from vit_flax.trainer import train
    from vit_flax.workdir import InUse

    folder = point_workdir(workdir, point)
    before = read_result(folder) or {}
    rungs, earlier = before.get("rungs", {}), before["secs"] if before.get("status") == "stopped" else 0.0
    since = time.monotonic()
    try:
        state, metrics = train(point.config, folder, stop_after=stop_after)
    except InUse:
        raise
    except Exception as error:  # one bad point must not end the others
        traceback.print_exc()
        entries: dict[str, Any] = dict(status="failed", error=f"{type(error).__name__}: {error}")
    else:
        entries = dict(status="done" if stop_after is None else "stopped", step=int(state.step), metrics=metrics)
        if stop_after is not None:
            rungs = {**rungs, str(stop_after): metrics}
    return write_result(folder, point, **entries, secs=earlier + time.monotonic() - since, rungs=rungs)


# Results.


def point_workdir(workdir: Path, point: Point) -> Path:
    """Where a point trains."""
    return workdir / "points" / point.name


def claim(workdir: Path, sweep: Sweep, search: Mapping[str, Any] | None = None) -> None:
    """Writes sweep.json, or checks that the one which is there describes the same base and the same search.

    Points may be added to a sweep and taken away from it; the base of the others must stay what it was.

    Args:
      workdir: of the sweep.
      sweep: see `load_sweep`.
      search: what a search may not change from one command to the next; JSON values. None: every point runs to its end.

    Raises: ConfigError: the folder holds another sweep, or another search; names what differs.
    """
    path, base = workdir / "sweep.json", flatten(sweep.base.to_dict())
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if keys := _differing(there["base"], as_json(base)):
            raise ConfigError(
                f"{workdir} holds a sweep of another base; it differs in {', '.join(keys[:8])}. "
                "Choose another --workdir, or put the base back."
            )
        if search is not None and there.get("search") and (keys := _differing(there["search"], dict(search))):
            rows = [f"  {key}: there {there['search'].get(key)!r}, here {search.get(key)!r}" for key in keys]
            raise ConfigError(
                f"{workdir} holds another search:\n" + "\n".join(rows) + "\nChoose another --workdir, or go on with "
                "that one."
            )
        search = search or there.get("search")
    workdir.mkdir(parents=True, exist_ok=True)
    points = {point.name: point.overrides for point in sweep.points}
    content = {"sweep": str(sweep.path), "doc": sweep.doc, "metrics": sweep.metrics, "search": search}
    write_atomically(path, json.dumps(content | {"base": base, "points": points}, indent=2))


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a point that has ended, well or not; None before that. Raises ValueError: it is damaged."""
    path = folder / RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the same command writes it again.") from None


def write_result(folder: Path, point: Point, **entries: Any) -> dict[str, Any]:
    """Notes how a point ended, and returns that."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": point.name, "overrides": point.overrides, **entries}
    write_atomically(folder / RESULT, json.dumps(content, indent=2))
    return as_json(content)


def pending(workdir: Path, sweep: Sweep) -> list[Point]:
    """The points that are not done."""
    return _not_done(workdir, sweep.points)


def _not_done(workdir: Path, points: Iterable[Point]) -> list[Point]:
    results = [(point, read_result(point_workdir(workdir, point))) for point in points]
    return [point for point, result in results if result is None or result["status"] != "done"]


def value_of(metrics: Mapping[str, float], deciding: tuple[str, bool]) -> float:
    """The deciding metric of a result, turned so that larger is better.

    Raises: ConfigError: the result does not have it; names those that it has.
    """
    name, larger_is_better = deciding
    if name not in metrics:
        raise ConfigError(f"The metric {name!r} decides, and the results do not have it: {', '.join(sorted(metrics))}.")
    return metrics[name] if larger_is_better else -metrics[name]


# Processes.


def _gpus(launcher: str, options: Mapping[str, Any], jobs: int) -> list[str]:
    """For each of the tasks that run at once on this machine, the GPUs that only it sees; Slurm allots them itself."""
    each = options.get("gpus_per_node", 0) if launcher == "local" else 0
    if not isinstance(each, int) or each < 0:
        raise ConfigError(f"--launcher_options: gpus_per_node={each!r}, expected a number of GPUs.")
    mine = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = _gpus_here(jobs * each) if mine is None else [gpu for gpu in mine.split(",") if gpu]
    if len(there) < jobs * each:
        found = f"this machine has {len(there)}" if mine is None else f"CUDA_VISIBLE_DEVICES={mine}"
        raise ConfigError(f"{jobs} jobs with gpus_per_node={each} need {jobs * each} GPUs, and {found}.")
    return [",".join(there[i * each : (i + 1) * each]) for i in range(jobs)]


def _gpus_here(wanted: int) -> list[str]:
    """The numbers of the GPUs of this machine; as many as are wanted where nothing can count them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return [str(number) for number in range(wanted)]
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed))]


def _executor(workdir: Path, launcher: str, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Running points in processes of their own needs submitit: pip install 'vit_flax[sweep]'."
        ) from error
    executor = submitit.AutoExecutor(folder=workdir / "jobs", cluster=launcher)
    try:
        executor.update_parameters(name="vit_flax", **{"timeout_min": 60 * 24, **options})
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"--launcher_options={json.dumps(dict(options))}: {error}") from error
    return executor


class _RunTask:
    """What a process of a launcher calls; it gets the task pickled, so that the sweep file may change meanwhile."""

    def __call__(self, task: Task, workdir: str, gpus: str) -> str | None:
        """Runs the task; returns its status, None after a signal to stop and a checkpoint, or if it runs elsewhere."""
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.setpgid(0, 0)  # Ctrl-C in a terminal reaches the whole group; `run` tells this process to stop, once
        exit_on_signals()
        requeue = signal.getsignal(TIME_IS_UP)
        received = []

        def save_first(number: int, _frame: Any) -> None:
            received.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(TIME_IS_UP, save_first)
        try:
            return self._train(task, Path(workdir))
        except SystemExit as stop:
            if received and callable(requeue):
                requeue(received[0], None)  # submitit puts the job back into the queue, and exits
            if stop.code != EXIT_PREEMPTED:
                raise
            return None

    def _train(self, task: Task, workdir: Path) -> str | None:
        from vit_flax.cache import enable_compilation_cache
        from vit_flax.gpu_flags import set_gpu_flags
        from vit_flax.workdir import InUse

        set_gpu_flags()
        enable_compilation_cache()
        try:
            return run_point(task.point, workdir, stop_after=task.stop_after)["status"]
        except InUse as error:  # by a process that outlived an earlier command
            print(error, file=sys.stderr)
            return None

    def checkpoint(self, task: Task, workdir: str, gpus: str) -> Any:
        """What submitit is to run when the job starts again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task, workdir, gpus)


_run_task = _RunTask()


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """Processes that start here inherit that: Ctrl-C would make submitit's controller kill its task after a second."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a notebook's worker; handlers are set in the main thread only
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _cancel(running: Collection[Any], launcher: str, say: Callable[[str], None]) -> None:
    """Asks tasks to save and stop; waits for those on this machine, so that the sweep can be started again at once.

    submitit's own `cancel` of a local job kills it after one second, which is too early for a save.
    """
    if launcher != "local":
        for job in running:
            job.cancel()
        return
    left = [job for job in running if not job.done()]
    for job in left:
        os.kill(int(job.job_id), signal.SIGTERM)  # the controller; it passes the signal on
    if left:
        say(f"Waiting for {len(left)} to save ...")
    while not all(job.done() for job in left):
        time.sleep(0.1)


def _settle(job: Any, point: Point, workdir: Path) -> dict[str, Any] | None:
    """The result of a task that has ended; notes a failure if its process died without doing so itself."""
    folder = point_workdir(workdir, point)
    if job.exception() is None:
        return read_result(folder) if job.result() is not None else None
    tail = (job.stderr() or "").strip().splitlines()[-1:]
    rungs = (read_result(folder) or {}).get("rungs", {})
    error = f"the process died: {tail[0] if tail else 'no output'}"
    return write_result(folder, point, status="failed", error=error, rungs=rungs)


def _outcome(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "stopped, or in use by another process; the same command goes on from its checkpoint"
    if result["status"] == "failed":
        return f"FAILED: {result['error'].splitlines()[0]}"
    numbers = [
        f"{k} {v:.4f}" for k, v in result["metrics"].items() if not (k.startswith("train/") or k.endswith("count"))
    ]
    return f"{'  '.join(numbers[:3])}  ({result['secs']:.0f} s)"
