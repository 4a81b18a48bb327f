"""`train(config, workdir)`: build the parts, restore, loop, close."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vit_flax import sharding, workdir
from vit_flax.augment import augment, normalize
from vit_flax.checkpoint import Checkpoints
from vit_flax.config import ConfigError, bind, check_names, check_section, hparams_of, in_steps
from vit_flax.data import Data, make_data
from vit_flax.evals import EVALS
from vit_flax.hooks import EXIT_PREEMPTED, Every, Hook, StopSignal
from vit_flax.losses import LOSSES
from vit_flax.models import make_model
from vit_flax.models.vit import ViT
from vit_flax.optim import RULES, make_optimizer
from vit_flax.step import TrainState, classification, init_state, train_step
from vit_flax.writer import TrainLog, Writer, print_results


def train(config: Mapping[str, Any], workdir_path: str | Path) -> tuple[TrainState, dict[str, float]]:
    """Trains what the config says, or goes on where an earlier call in the same workdir stopped.

    Args:
      config: see `configs/`; a ConfigDict or nested dicts.
      workdir_path: a folder for everything that the run writes.

    Returns: the final state and the latest metrics.

    Raises:
      ConfigError: the config cannot be run, or the workdir holds another experiment.
      SystemExit: with `hooks.EXIT_PREEMPTED`, after a signal to stop and a complete checkpoint.
    """
    job = build(config)
    folder = Path(workdir_path).absolute()
    with workdir.lock(folder), StopSignal() as stop:
        workdir.claim(folder, job.config)
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
    job: "Job", state: TrainState, checkpoints: Checkpoints, writer: Writer, stop: StopSignal
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


def evaluate(config: Mapping[str, Any], workdir_path: str | Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a workdir.

    Raises: FileNotFoundError: there is none. Otherwise as `train`.
    """
    job = build(config)
    folder = Path(workdir_path).absolute()
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"There is no checkpoint below {folder}: train first, or check --workdir.")
    with workdir.lock(folder):
        workdir.claim(folder, job.config)
        with Checkpoints(str(folder / "checkpoints"), **job.checkpoint) as checkpoints:
            state = restore_or_init(job, checkpoints, must_exist=True)
    results: dict[str, float] = {}
    with Writer(None, start_step=0, total_steps=job.run.total_steps) as writer:
        for hook in job.evaluations(writer, None, results):
            hook(job.run.total_steps, state)
    print_results(writer.console, {"step": float(state.step), **results}, workdir.places(folder))
    return results


def restore_or_init(job: "Job", checkpoints: Checkpoints, must_exist: bool = False) -> TrainState:
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
    return jax.jit(job.init, out_shardings=shardings)()


@dataclasses.dataclass(frozen=True)
class Run:
    """The `run` section.

    Attributes:
      seed: of the parameters, the data order and all randomness in training.
      total_steps: of the run; `total_epochs` in a config.
      log_every_steps: length of the intervals over which training metrics are averaged.
      accumulate_steps: a batch is cut into so many parts, to save memory.
      ema_decay: of a moving average of the parameters, evaluated beside them; 0 for none.
      max_skipped_steps: stops the run after so many steps in a row that were not finite.
    """

    seed: int
    total_steps: int
    log_every_steps: int
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    max_skipped_steps: int = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """A config turned into parts. Nothing expensive has happened yet; each method makes one part."""

    config: dict[str, Any]
    run: Run
    data: Data
    model: ViT
    mesh: jax.sharding.Mesh
    sections: dict[str, dict[str, Any]]
    hparams: dict[str, float]

    @property
    def checkpoint(self) -> dict[str, Any]:
        """Arguments of `Checkpoints`."""
        return {k: v for k, v in self.sections["checkpoint"].items() if k != "every_steps"}

    @property
    def save_every_steps(self) -> int | None:
        """Distance of the checkpoints."""
        return self.sections["checkpoint"]["every_steps"]

    def identity(self) -> dict[str, Any]:
        """What must be equal for two processes to be two lives of one run."""
        return {**workdir.identity(self.config), "data": self.data.fingerprint()}

    def init(self) -> TrainState:
        """The state before the first step (to be jitted)."""
        h, w, c = self.data.image_shape
        image = jnp.zeros((1, h, w, c))
        return init_state(
            jax.random.key(self.run.seed),
            init=lambda key: self.model.init(key, image, train=False)["params"],
            optimizer=self.optimizer(),
            hparams={name: jnp.asarray(value, jnp.float32) for name, value in self.hparams.items()},
        )

    def optimizer(self) -> Callable[..., Any]:
        """`hparams -> GradientTransformation`."""
        section = {**self.sections["optim"], "total_steps": self.run.total_steps}
        make = bind(make_optimizer, "optim", section)
        return lambda hparams: make(hparams=hparams)

    def train_step(self) -> Callable[..., Any]:
        """The jitted `(state, batch) -> (state, metrics)`; the state is donated."""
        loss = {k: v for k, v in self.sections["loss"].items() if k != "name"}
        objective = partial(
            classification,
            apply=bind(self.model.apply, "model", {}),
            augment=bind(augment, "augment", self.sections["augment"]),
            loss=bind(LOSSES[self.sections["loss"]["name"]], "loss", loss),
            num_classes=self.data.num_classes,
        )
        step = partial(
            train_step,
            objective=objective,
            optimizer=self.optimizer(),
            accumulate_steps=self.run.accumulate_steps,
        )
        return jax.jit(step, donate_argnums=0)

    def train_batches(self, start_step: int) -> Iterator[dict[str, jax.Array]]:
        """Batches on the devices from `start_step` on; one is always on its way while another is worked on."""
        batches = self.data.train(
            seed=self.run.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        put = partial(sharding.put_batch, mesh=self.mesh, global_batch_size=self.data.batch_size)
        ahead = put(next(batches))
        while True:
            batch, ahead = ahead, put(next(batches))
            yield batch

    def train_log(self, writer: Writer) -> TrainLog:
        """Averages and writes the metrics of the steps."""
        return TrainLog(
            writer,
            every_steps=self.run.log_every_steps,
            batch_size=self.data.batch_size,
            total_steps=self.run.total_steps,
            max_skipped=self.run.max_skipped_steps,
        )

    def evaluations(self, writer: Writer, log: TrainLog | None, results: dict[str, float]) -> list[Hook]:
        """One hook per entry of `evals`; each writes its metrics and puts them into `results`."""
        split = self.data.eval(process_index=jax.process_index(), process_count=jax.process_count())
        put = partial(sharding.put_batch, mesh=self.mesh, global_batch_size=self.data.eval_batch_size)
        pixels = {k: self.sections["augment"][k] for k in ("mean", "std")}

        def hook(name: str, section: dict[str, Any]) -> Every:
            evaluation = EVALS[section["type"]](
                apply=self.model.apply,
                normalize=partial(normalize, **pixels),
                batches=lambda: map(put, split),
            )

            def run(step: int, state: TrainState) -> None:
                since = time.perf_counter()
                found = {f"{name}/{metric}": value for metric, value in evaluation.run(state).items()}
                results.update(found)
                if log is not None:
                    log.exclude(time.perf_counter() - since)
                writer.write(step, found)
                writer.say(f"step {step} " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))

            return Every(run, every_steps=section["every_steps"], total_steps=self.run.total_steps)

        return [hook(name, self.sections[f"evals.{name}"]) for name in self.config["evals"]]


# Section -> the callable whose signature is its schema, and the arguments that the program supplies itself.
SECTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "run": (Run, ()),
    "data": (make_data, ()),
    "model": (make_model, ()),
    "augment": (augment, ("key", "images", "targets")),
    "loss": (lambda name: None, ()),
    "optim": (make_optimizer, ("total_steps",)),
    "checkpoint": (Checkpoints, ("directory",)),
    "evals": (dict, ()),
}


def build(config: Mapping[str, Any]) -> Job:
    """Checks a config and turns it into parts; reads headers of the data and no pictures, compiles nothing.

    Raises: ConfigError: names the key, what was found and what to do.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # type: ignore[attr-defined]
    check_names("", config, SECTIONS, required=SECTIONS)
    check_section("data", config["data"], make_data)
    with _as_config_error("data"):
        data = make_data(**config["data"])
    steps_per_epoch = data.num_train / data.batch_size
    evals = {f"evals.{name}": section for name, section in config["evals"].items()}
    flat = {name: section for name, section in config.items() if name != "evals"} | evals
    sections = {name: in_steps(name, section, steps_per_epoch) for name, section in flat.items()}
    _check_sections(sections)
    with _as_config_error("model"):
        model = make_model(**sections["model"])
    _check_fit(model, data, sections)
    return Job(
        config=config,
        run=Run(**sections["run"]),
        data=data,
        model=model,
        mesh=sharding.make_mesh(),
        sections=sections,
        hparams=hparams_of(sections),
    )
