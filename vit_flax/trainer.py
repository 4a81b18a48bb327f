"""`train(config, workdir)`: build the parts, restore, loop, close."""

import time
from pathlib import Path

import jax

from vit_flax import sharding, workdir
from vit_flax.checkpoint import Checkpoints
from vit_flax.config import Config, plain
from vit_flax.hooks import EXIT_PREEMPTED, Every, StopSignal
from vit_flax.job import Job, build
from vit_flax.step import TrainState
from vit_flax.writer import Writer, print_results


def train(config: Config, workdir_path: str | Path) -> tuple[TrainState, dict[str, float]]:
    """Trains what the config says, or goes on where an earlier call in the same workdir stopped.

    Args:
      config: see `configs/`; a ConfigDict or nested dicts.
      workdir_path: a folder for everything that the run writes.

    Returns: the final state and the latest metrics.

    Raises:
      ConfigError: the config cannot be run, or the workdir holds another experiment.
      SystemExit: with `hooks.EXIT_PREEMPTED`, after a signal to stop and a complete checkpoint.
    """
    folder = Path(workdir_path).absolute()
    job = build(workdir.completed(folder, config))
    with workdir.lock(folder), StopSignal() as stop:
        workdir.claim(folder, job.config, given=plain(config), **job.facts())
        with Checkpoints(str(folder / "checkpoints"), **job.checkpoint) as checkpoints:
            state = restore_or_init(job, checkpoints)
            with Writer(folder, start_step=int(state.step), total_steps=job.run.total_steps) as writer:
                state, results = _loop(job, state, checkpoints, writer, stop)
    if stop.received:
        writer.say(f"Stopped by {stop.received} after step {int(state.step)}; the same command goes on from there.")
        raise SystemExit(EXIT_PREEMPTED)
    print_results(writer.console, results, workdir.places(folder))
    return state, results


def _loop(
    job: Job, state: TrainState, checkpoints: Checkpoints, writer: Writer, stop: StopSignal
) -> tuple[TrainState, dict[str, float]]:
    """The training loop. Its order is a contract: fetch the batch, step, log, evaluate, save, look for signals."""
    total, results = job.run.total_steps, dict[str, float]()
    step_fn, batches, log = job.train_step(), job.train_batches(int(state.step)), job.train_log(writer)

    def save(step: int, state: TrainState) -> None:
        checkpoints.save(step, state, identity=job.identity(), metrics=results)

    hooks = [*job.evaluations(writer, log, results), Every(save, every_steps=job.save_every_steps, total_steps=total)]
    for step in range(int(state.step) + 1, total + 1):
        waiting_since = time.perf_counter()
        batch = next(batches)
        waited_secs = time.perf_counter() - waiting_since
        state, metrics = step_fn(state, batch)
        log(step, metrics, waited_secs)
        for hook in hooks:
            hook(step, state)
        if stop.received:
            save(step, state)
            break
    log.flush()
    return state, {**{f"train/{name}": value for name, value in log.last.items()}, **results}


def evaluate(config: Config, workdir_path: str | Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a workdir.

    Raises: FileNotFoundError: there is none. Otherwise as `train`.
    """
    folder = Path(workdir_path).absolute()
    job = build(workdir.completed(folder, config))
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"There is no checkpoint below {folder}: train first, or check --workdir.")
    with workdir.lock(folder):
        workdir.claim(folder, job.config, given=plain(config), **job.facts())
        with Checkpoints(str(folder / "checkpoints"), **job.checkpoint) as checkpoints:
            state = restore_or_init(job, checkpoints, must_exist=True)
    results: dict[str, float] = {}
    with Writer(None, start_step=0, total_steps=job.run.total_steps) as writer:
        for hook in job.evaluations(writer, None, results):
            hook(job.run.total_steps, state)
    print_results(writer.console, {"step": float(state.step), **results}, workdir.places(folder))
    return results


def restore_or_init(job: Job, checkpoints: Checkpoints, must_exist: bool = False) -> TrainState:
    """The newest whole checkpoint of this run, or the state before the first step."""
    abstract = jax.eval_shape(job.init)
    shardings = sharding.state_sharding(abstract, job.mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = checkpoints.restore(target, identity=job.identity())
    if state is not None:
        return state
    if must_exist:
        raise FileNotFoundError("There is no checkpoint in this workdir: train first, or check --workdir.")
    # The same shardings as a restored state, so that both run the same compiled step.
    return jax.jit(job.init, out_shardings=shardings)(job.pretrained())
