"""Running the points of a sweep: one by one in this process, or many at once in processes of their own.

Every point has a folder `points/NAME` below the sweep's, which is an ordinary workdir of `train`, and a `result.json`
in it once it has ended. A sweep that is started again keeps what is done, lets half-finished points go on and tries
failed ones again.
"""

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_flax.config import ConfigError, flatten
from vit_flax.files import write_atomically
from vit_flax.sweep.points import Point, Sweep, load_sweep

LAUNCHERS = ("local", "slurm")
RESULT = "result.json"


def point_workdir(workdir: Path, point: Point) -> Path:
    """Where a point trains."""
    return workdir / "points" / point.name


def claim(workdir: Path, sweep: Sweep) -> None:
    """Writes sweep.json, or checks that the one which is there describes the same base.

    Points may be added to a sweep and taken away from it; the base of the others must stay what it was.

    Raises: ConfigError: the folder holds another sweep.
    """
    path, base = workdir / "sweep.json", flatten(sweep.base.to_dict())
    if path.exists():
        there = json.loads(path.read_text())["base"]
        here = json.loads(json.dumps(base))
        differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        if differing:
            raise ConfigError(
                f"{workdir} holds a sweep of another base; it differs in {', '.join(differing[:8])}. "
                "Choose another --workdir, or put the base back."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    points = {point.name: point.overrides for point in sweep.points}
    content = {"sweep": str(sweep.path), "doc": sweep.doc, "metrics": sweep.metrics, "base": base, "points": points}
    write_atomically(path, json.dumps(content, indent=2))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a point that has ended, well or not; None before that."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, point: Point, **entries: Any) -> None:
    """Notes how a point ended."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": point.name, "overrides": point.overrides, **entries}
    write_atomically(folder / RESULT, json.dumps(content, indent=2))


def pending(workdir: Path, sweep: Sweep) -> list[Point]:
    """The points that are not done."""
    results = [read_result(point_workdir(workdir, point)) for point in sweep.points]
    return [p for p, result in zip(sweep.points, results) if result is None or result["status"] != "done"]


def run_point(sweep: Sweep, workdir: Path, index: int) -> dict[str, Any]:
    """Trains one point to its end, in this process, and notes its result; an error is noted, not raised."""
    from vit_flax.trainer import train

    point = sweep.points[index]
    folder = point_workdir(workdir, point)
    since = time.time()
    try:
        _, metrics = train(point.config, folder)
    except Exception as error:  # one bad point must not end the others
        traceback.print_exc()
        write_result(folder, point, status="failed", error=f"{type(error).__name__}: {error}", secs=time.time() - since)
    else:
        write_result(folder, point, status="done", metrics=metrics, secs=time.time() - since)
    result = read_result(folder)
    assert result is not None
    return result


def _run_point_of(sweep_path: str, workdir: str, index: int) -> str:
    """What a job of a launcher calls: everything it gets is text."""
    from vit_flax.cache import enable_compilation_cache

    enable_compilation_cache()
    return run_point(load_sweep(sweep_path), Path(workdir), index)["status"]


def run(
    sweep: Sweep,
    workdir: Path,
    *,
    jobs: int,
    launcher: str,
    launcher_options: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> None:
    """Runs the pending points, at most `jobs` at a time, each in a process of its own.

    Args:
      sweep: see `load_sweep`.
      workdir: of the sweep.
      jobs: how many run at once.
      launcher: "local" or "slurm".
      launcher_options: parameters of submitit, such as {"slurm_partition": "gpu", "gpus_per_node": 1}.
      say: takes a line about each point that ends.

    Raises: ModuleNotFoundError: submitit is not installed; says how to.
    """
    points = pending(workdir, sweep)
    executor = _executor(workdir, launcher, launcher_options)
    waiting, running = list(points), dict[Any, Point]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                point = waiting.pop(0)
                running[executor.submit(_run_point_of, str(sweep.path), str(workdir), point.index)] = point
            for job in [job for job in running if job.done()]:
                point = running.pop(job)
                _settle(job, point, point_workdir(workdir, point))
                say(_line(workdir, point, len(points) - len(waiting) - len(running), len(points)))
            time.sleep(0.2)
    finally:
        for job in running:  # an interrupted sweep leaves no process behind; its points go on from their checkpoints
            job.cancel()


def _executor(workdir: Path, launcher: str, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Running points in processes of their own needs submitit: pip install 'vit_flax[sweep]'."
        ) from error
    executor = submitit.AutoExecutor(folder=workdir / "jobs", cluster=launcher)
    executor.update_parameters(name="vit_flax", **{"timeout_min": 60 * 24, **options})
    return executor


def _settle(job: Any, point: Point, folder: Path) -> None:
    """Notes a failure for a point whose process died without doing so itself."""
    if job.exception() is not None and read_result(folder) is None:
        tail = (job.stderr() or "").strip().splitlines()[-1:]
        write_result(folder, point, status="failed", error="the process died: " + (tail[0] if tail else "no output"))


def _line(workdir: Path, point: Point, number: int, total: int) -> str:
    result = read_result(point_workdir(workdir, point))
    if result is None:
        return f"[{number}/{total}] {point.name}: stopped; the same command goes on from its checkpoint"
    if result["status"] != "done":
        return f"[{number}/{total}] {point.name}: FAILED: {result['error'].splitlines()[0]}"
    return f"[{number}/{total}] {point.name}: {_numbers(result['metrics'])}  ({result['secs']:.0f} s)"


def _numbers(metrics: Mapping[str, float], names: Sequence[str] = ()) -> str:
    chosen = names or [name for name in metrics if not name.startswith("train/")]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in list(chosen)[:3])
