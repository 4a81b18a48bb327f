"""Successive halving: all points train a little, the best of them go on, the best of those go on further.

A *rung* is a number of steps after which points are compared. With one job a rung is complete before its best go on:
successive halving. With several, a point goes on as soon as it is among the best of those that have arrived, so that
no worker waits for the slowest point: ASHA.

Sources: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"; Li et
al. 2020, "A System for Massively Parallel Hyperparameter Tuning", Algorithm 2. Theirs draws points without end; here
they come from the sweep in its order, and when no more can come, the best one of a rung goes on however few there are:
one point at least is trained to its end.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_flax.config import ConfigError
from vit_flax.sweep.points import Point
from vit_flax.sweep.run import Task, point_workdir, read_result, value_of


def rungs_of(total_steps: Sequence[int], factor: int, min_steps: int | None) -> list[int]:
    """The rungs, in steps, from the first to the whole run: each is `factor` times (rounded down) the one before.

    Args:
      total_steps: of each point.
      factor: 2 or more; one of so many points goes on.
      min_steps: no rung is below that; None: three rungs.

    Raises: ConfigError: the points differ in length, or there is no room for a rung before the end.
    """
    total = total_steps[0]
    if len(set(total_steps)) > 1:
        raise ConfigError(
            f"Halving compares points after the same number of steps, and these have {min(total_steps)} to "
            f"{max(total_steps)}: give all of them the same run.total_steps."
        )
    if factor < 2:
        raise ConfigError(f"--halving_factor={factor}: expected 2 or more; one of so many points goes on.")
    least = max(1, total // factor**2) if min_steps is None else min_steps
    if not 1 <= least <= total // factor:
        raise ConfigError(
            f"--min_steps={least}: expected 1 to {total // factor}, so that points of {total} steps are compared at "
            f"least once before their end (with --halving_factor={factor})."
        )
    rungs = [total]
    while total // factor ** len(rungs) >= least:
        rungs.append(total // factor ** len(rungs))
    return rungs[::-1]


class Halving:
    """What trains next, given the results so far; a `Plan`.

    It keeps nothing but results, which are in the folders of the points: started again, it decides as it would have.
    Points that failed, or whose metric is not finite, rank last and never go on; those that failed in an earlier life
    are tried again.

    Args:
      points: of the sweep.
      workdir: of the sweep.
      rungs: see `rungs_of`.
      factor: one of so many points goes on.
      deciding: the metric, and whether larger is better.
      asynchronous: points go on before their rung is complete.

    Raises: ConfigError: the results do not have the metric.
    """

    def __init__(
        self,
        points: tuple[Point, ...],
        workdir: Path,
        *,
        rungs: Sequence[int],
        factor: int,
        deciding: tuple[str, bool],
        asynchronous: bool,
    ):
        self.points, self._rungs, self._factor = points, rungs, factor
        self._deciding, self._asynchronous = deciding, asynchronous
        # Of each rung: index of a point -> its metric there, larger is better.
        self._found: list[dict[int, float]] = [{} for _ in rungs]
        self._given: set[tuple[int, int]] = set()  # (rung, index) in this life: nothing is tried twice
        self._running: set[tuple[int, int]] = set()
        for point in points:
            self._read(point, read_result(point_workdir(workdir, point)))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, in a later life neither."""
        return self._complete(len(self._rungs) - 1)

    def next(self) -> Task | None:
        """The best point that may go on, from the highest rung; else one that has not started."""
        for rung in range(len(self._rungs) - 1, 0, -1):
            for index in self._go_on(rung - 1):
                if self._is_open(rung, index):
                    return self._give(rung, index)
        for index in range(len(self.points)):
            if self._is_open(0, index):
                return self._give(0, index)
        return None

    def ended(self, task: Task, result: Mapping[str, Any] | None) -> str:
        """Takes a result into its rung."""
        rung = self._rungs.index(task.stop_after or self._rungs[-1])
        self._running.discard((rung, task.point.index))
        self._read(task.point, result)
        if result is not None and result["status"] == "failed":
            self._found[rung][task.point.index] = -math.inf
        return f"[rung {rung + 1}/{len(self._rungs)}]"

    def _go_on(self, rung: int) -> list[int]:
        """The points of a rung that may go on to the next, best first; of equals, the first of the sweep."""
        found, complete = self._found[rung], self._complete(rung)
        if not (complete or self._asynchronous):
            return []
        count = len(found) // self._factor
        best = sorted(found, key=lambda index: (-found[index], index))[: max(1, count) if complete else count]
        return [index for index in best if found[index] > -math.inf]

    def _complete(self, rung: int) -> bool:
        """Whether no more results can come to a rung."""
        if any(running == rung for running, _ in self._running):
            return False
        if rung == 0:
            return len(self._found[0]) == len(self.points)
        return self._complete(rung - 1) and all(index in self._found[rung] for index in self._go_on(rung - 1))

    def _is_open(self, rung: int, index: int) -> bool:
        return index not in self._found[rung] and (rung, index) not in self._given

    def _give(self, rung: int, index: int) -> Task:
        self._given.add((rung, index))
        self._running.add((rung, index))
        return Task(self.points[index], None if rung == len(self._rungs) - 1 else self._rungs[rung])

    def _read(self, point: Point, result: Mapping[str, Any] | None) -> None:
        """Takes what a point has reached; one that is done without rungs (by a sweep before) is past all of them."""
        if result is None:
            return
        at = dict(result.get("rungs") or {})
        if result["status"] == "done":
            at = {str(step): result["metrics"] for step in self._rungs} | at
        for rung, step in enumerate(self._rungs):
            if str(step) in at:
                value = value_of(at[str(step)], self._deciding)
                self._found[rung][point.index] = value if math.isfinite(value) else -math.inf
