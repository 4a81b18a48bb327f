"""A search with Optuna: the sweep file's `suggest(trial)` gives the overrides of each trial, a point like any other.

The study is in the folder of the sweep (`optuna.journal`), and only this process reads and writes it; the processes
that train leave a `result.json`, as those of any sweep. Each trial is drawn with a seed of its own: what a search does
depends on its seed and on the results so far, and not on where it was interrupted.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_flax.config import ConfigError
from vit_flax.sweep.points import Point, Sweep, suggested
from vit_flax.sweep.run import Task, point_workdir, read_result, value_of

JOURNAL = "optuna.journal"
OVERRIDES = "overrides"  # where a trial keeps the overrides of its point


class Trials:
    """The trials of a search, one after the other; a `Plan`.

    Trials that an earlier life left unfinished come first, with the values that they had. A trial that failed, or whose
    metric is not finite, counts, tells the sampler nothing and is not tried again. One that asks for a point that is
    done takes its result.

    Args:
      sweep: with `suggest`.
      workdir: of the sweep; None for a study that is not kept.
      count: of trials in all, with those of earlier lives.
      seed: of the sampler, `optuna.samplers.TPESampler` (Bergstra et al. 2011).

    Raises: ModuleNotFoundError: Optuna is not installed; says how to. ConfigError: `count` is below 1.
    """

    def __init__(self, sweep: Sweep, workdir: Path | None, *, count: int, seed: int):
        if count < 1:
            raise ConfigError(f"--trials={count}: expected 1 or more.")
        self._optuna = optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = None
        if workdir is not None:
            _cut_half_a_line(workdir / JOURNAL)
            backend = optuna.storages.journal.JournalFileBackend(str(workdir / JOURNAL))
            storage = optuna.storages.JournalStorage(backend)
        # Larger is better: `value_of` turns the others around.
        self._study = optuna.create_study(
            study_name="sweep", storage=storage, direction="maximize", load_if_exists=True
        )
        self._sweep, self._workdir, self._count, self._seed = sweep, workdir, count, seed
        self._unfinished = [trial for trial in self._study.get_trials(deepcopy=False) if not trial.state.is_finished()]
        self._running: dict[str, Any] = {}  # name of a point -> its trial
        self._waiting: tuple[Any, Point] | None = None  # a trial that asks for a point which is running

    @property
    def points(self) -> tuple[Point, ...]:
        """Of all trials so far, each once, in the order of the trials."""
        points: dict[str, Point] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if OVERRIDES in trial.user_attrs:
                overrides = json.loads(trial.user_attrs[OVERRIDES])
                point = suggested(self._sweep.base, overrides, trial.number, where=f"trial {trial.number}")
                points.setdefault(point.name, point)
        return tuple(points.values())

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, in a later life neither."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False)) >= self._count

    def next(self) -> Task | None:
        """The next trial that has to be trained."""
        while (asked := self._waiting or self._ask()) is not None:
            trial, point = asked
            self._waiting = asked if point.name in self._running else None
            if self._waiting:
                return None
            result = read_result(point_workdir(self._workdir, point)) if self._workdir else None
            if result is None or result["status"] != "done":
                self._running[point.name] = trial
                return Task(point)
            self._tell(trial, result)
        return None

    def ended(self, task: Task, result: Mapping[str, Any] | None) -> str:
        """Tells the study; a trial that was interrupted stays open for a later life."""
        trial = self._running.pop(task.point.name)
        if result is not None:
            self._tell(trial, result)
        return f"[trial {trial.number + 1}/{self._count}]"

    def _ask(self) -> tuple[Any, Point] | None:
        """A trial and its point; None when there are enough."""
        if self._unfinished:
            # No public way leads from a trial that was read to one that can be told; asking it suggests what it had.
            trial = self._optuna.trial.Trial(self._study, self._unfinished.pop(0)._trial_id)
        elif (number := len(self._study.get_trials(deepcopy=False))) < self._count:
            seed = (self._seed * 2**16 + number) % 2**32
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            trial = self._study.ask()
        else:
            return None
        assert self._sweep.suggest is not None
        where = f"{self._sweep.path}, suggest(trial) for trial {trial.number}"
        try:
            overrides = self._sweep.suggest(trial)
        except Exception as error:
            raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
        point = suggested(self._sweep.base, overrides, trial.number, where=where)
        trial.set_user_attr(OVERRIDES, json.dumps(point.overrides))
        return trial, point

    def _tell(self, trial: Any, result: Mapping[str, Any]) -> None:
        value = value_of(result["metrics"], self._sweep.deciding) if result["status"] == "done" else math.nan
        if math.isfinite(value):
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _cut_half_a_line(journal: Path) -> None:
    """Drops what a full disk may leave at the end of a journal: Optuna could not read past it."""
    if journal.exists() and not (text := journal.read_bytes()).endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A search with suggest(trial) needs Optuna: pip install 'vit_flax[sweep]'."
        ) from error
    return optuna
