"""`train(config, workdir)`: build the parts, restore, loop, close."""

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax

from vit_flax import distributed, workdir
from vit_flax.bad_steps import Diverged
from vit_flax.checkpoint import CheckpointMismatch, Checkpoints, Restored, SaveFailed, load_params
from vit_flax.checksums import differences, rows_of, shapes
from vit_flax.config import Config, ConfigError
from vit_flax.job import Job, build
from vit_flax.report import write_report
from vit_flax.signals import EXIT_PREEMPTED, Interrupted, StopSignal
from vit_flax.step import TrainState
from vit_flax.writer import Writer, print_groups, print_results

log = logging.getLogger(__name__)


def train(
    config: Config, workdir_path: str | Path, *, stop_after: int | None = None
) -> tuple[TrainState, dict[str, float]]:
    """Trains what the config says, or goes on where an earlier call in the same workdir stopped.

    Args:
      config: see `configs/`; a ConfigDict or nested dicts.
      workdir_path: a folder for everything that the run writes.
      stop_after: stops after this step of the run, with an evaluation and a checkpoint; a later call goes on from there
        and ends with what an uninterrupted run ends with. Schedules are those of the whole run.

    Returns: the final state and the latest metrics.

    Raises:
      ConfigError: the config cannot be run, or the workdir holds another experiment.
      CheckpointMismatch: the same, found in a checkpoint.
      Diverged: too many steps in a row were not finite; a checkpoint has the last good parameters.
      OSError: no checkpoint is whole; SaveFailed: one could not be written.
      SystemExit: with `signals.EXIT_PREEMPTED`, after a signal to stop and a complete checkpoint.
    """
    with distributed.stop_signal() as stop:
        completed = workdir.completed(workdir.path(workdir_path), config)
        job = build(config, completed=completed, stop_after=stop_after)
        return train_job(job, workdir_path, stop)


def train_job(job: Job, workdir_path: str | Path, stop: StopSignal) -> tuple[TrainState, dict[str, float]]:
    """As `train`, for a job that is built already (and perhaps changed)."""
    folder = workdir.path(workdir_path)
    with workdir.lock(folder) if distributed.is_main() else nullcontext():
        if distributed.is_main():
            workdir.claim(folder, job.config, given=job.given)
        with Checkpoints(str(folder / "checkpoints"), **job.checkpoint) as checkpoints:
            start = restore_or_init(job, checkpoints)
            with job.writer(folder, start_step=start.step) as writer:
                print_groups(writer.console, job.parameter_groups(start.state.params))
                loop = Loop(job, start, checkpoints, writer, stop)
                loop.run()
                if loop.finished and loop.step == job.run.total_steps:
                    writer.finish(loop.results)
    if not loop.finished:
        writer.say(f"Stopped by {stop.received} after step {loop.step}; the same command goes on from there.")
        raise SystemExit(EXIT_PREEMPTED)
    if writer.active:
        write_report(folder)
    print_results(writer.console, loop.results, workdir.places(folder))
    return loop.state, loop.results


class Loop:
    """The training loop, and all that it knows besides the state.

    What it knows goes into the checkpoints as their `progress`, so that a resumed run writes the metrics, and keeps the
    checkpoints, that an uninterrupted one does.
    """

    def __init__(self, job: Job, start: Restored, checkpoints: Checkpoints, writer: Writer, stop: StopSignal):
        self._job, self._checkpoints, self._writer, self._stop = job, checkpoints, writer, stop
        self.step, self.state = start.step, start.state
        before = start.progress or {"interval": {}, "last": {}, "latest": {}, "found": {}, "evaluated": True}
        self._latest: dict[str, float] = before["latest"]  # of all evaluations
        self._found: dict[str, float] = before["found"]  # by the evaluations at this step
        self._evaluated: bool = before["evaluated"]  # all evaluations of this step are done
        self._log = job.train_log(writer, before["interval"], before["last"])
        self._bad_steps = job.bad_steps(writer)
        self._evaluations = job.evaluation_hooks(job.evaluations(stop), writer, self._log, self._found)
        self._profile = job.profile(writer)
        self._save_on_schedule = job.every("checkpoint", lambda *_: self._save())

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.step >= self._job.last_step and self._evaluated

    @property
    def results(self) -> dict[str, float]:
        """The latest metrics."""
        return {**{f"train/{name}": value for name, value in self._log.last.items()}, **self._latest}

    def run(self) -> None:
        """Trains until the last step or a signal to stop, and saves, whatever ends it."""
        self._stop.hold()
        try:
            self._run()
        except Interrupted:
            self._save()
        except SaveFailed:
            raise
        except Exception as error:
            self._save_after(error)
            raise
        else:
            self._save()

    def _run(self) -> None:
        """The order is a contract: fetch the batch, step, log, evaluate, save, look for signals."""
        job, last = self._job, self._job.last_step
        if not self._evaluated:
            self._evaluate()
            self._checkpoints.amend(self.step, metrics=self._found, progress=self._progress())
        step_fn, batches = job.train_step(), job.train_batches(self.step)
        while not self._stop.reached(self.step) and self.step < last:
            waiting_since = time.perf_counter()
            batch = next(batches)
            waited_secs = time.perf_counter() - waiting_since
            if self.step == 0:
                job.draw(batch, self._writer)
            self.state, metrics = step_fn(self.state, batch)
            self.step += 1
            self._found.clear()
            self._evaluated = False
            self._bad_steps(self.step, batch, metrics)
            self._log(self.step, {**metrics, **batches.counts}, waited_secs)
            self._profile(self.step, self.state)
            self._evaluate()
            if self._checkpoints.would_be_best(self._found):
                self._save()
            self._save_on_schedule(self.step, self.state)
            self._checkpoints.check()
        self._bad_steps.flush()

    def _evaluate(self) -> None:
        """Runs the evaluations that are due; only the rest of them, where a signal has cut them short before."""
        done = {name.partition("/")[0] for name in self._found}
        for name, evaluation in self._evaluations.items():
            if name not in done:
                evaluation(self.step, self.state)
        self._latest.update(self._found)
        self._evaluated = True

    def _save(self) -> None:
        self._checkpoints.save(
            self.step,
            self.state,
            identity=self._job.identity(),
            about=self._job.about(),
            metrics=self._found,
            progress=self._progress(),
        )

    def _progress(self) -> dict[str, Any]:
        return {
            "interval": self._log.open_interval(),  # the steps since the last line of the log
            "last": self._log.last,
            "latest": dict(self._latest),  # copies: a thread writes them down while the loop goes on
            "found": dict(self._found),
            "evaluated": self._evaluated,
        }

    def _save_after(self, error: Exception) -> None:
        """Saves what there is when the run cannot go on; never hides why it cannot."""
        if jax.process_count() > 1 and not isinstance(error, Diverged):  # which all processes find after the same step
            return  # the other processes are still training, and a save needs them all
        try:
            self._save()
            self._checkpoints.wait()
        except Exception as second:
            log.error("After this error, step %s could not be saved: %s", self.step, second)
        else:
            if isinstance(error, Diverged):
                error.args = (f"{error}\nCheckpoint {self.step} has the parameters from before these steps.",)


def evaluate(config: Config, workdir_path: str | Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run, which may still be training.

    Args:
      config: of the run; what it evaluates on may differ (`workdir.MAY_CHANGE`).
      workdir_path: its folder; nothing is written there.

    Returns: the figures of each evaluation, such as "test/top1".

    Raises: FileNotFoundError: there is none. Otherwise as `train`.
    """
    folder = workdir.path(workdir_path)
    job = build(config, completed=workdir.completed(folder, config))
    step, state = _state_to_evaluate(job, folder)
    results: dict[str, float] = {}
    with job.writer(None, start_step=0) as writer:
        for hook in job.evaluation_hooks(job.evaluations(StopSignal()), writer, None, results).values():
            hook.now(step, state)
    print_results(writer.console, {"step": float(step), **results}, workdir.places(folder))
    return results


def _state_to_evaluate(job: Job, folder: Path) -> tuple[int, TrainState]:
    """What evaluations read of the newest checkpoint."""
    saved = load_params(folder)
    workdir.check(folder, job.config)
    if changed := [(old, new) for old, new in zip(saved.class_names, job.data.class_names) if old != new]:
        raise ConfigError(
            f"Checkpoint {saved.step} in {folder} has other classes than the data: {changed[0][0]!r} was where "
            f"{changed[0][1]!r} is ({len(changed)} differ). Put the data back, or evaluate another workdir."
        )
    target = job.abstract_state()
    if diff := differences(shapes(saved.params), shapes(target.params)):
        rows = rows_of(diff, "checkpoint", "now")
        raise CheckpointMismatch(f"Checkpoint {saved.step} in {folder} has other parameters than the model:\n{rows}")
    ema = load_params(folder, step=saved.step, ema=True).params if target.ema is not None else None
    places = jax.tree.map(lambda x: x.sharding, (target.params, target.ema))
    params, ema = jax.device_put((saved.params, ema), places)
    empty = jax.tree.map(lambda _: None, target)
    return saved.step, empty.replace(step=saved.step, params=params, ema=ema, opt_state=None)


def restore_or_init(job: Job, checkpoints: Checkpoints) -> Restored:
    """The newest whole checkpoint of this run, or the state before the first step."""
    target = job.abstract_state()
    restored = checkpoints.restore(target, identity=job.identity())
    if restored is not None:
        return restored
    # The same shardings as a restored state, so that both run the same compiled step.
    init = jax.jit(job.init, out_shardings=jax.tree.map(lambda x: x.sharding, target))
    return Restored(0, init(job.pretrained()), {})
