"""From a config to the parts of a run: `build(config) -> Job`.

The one place where configs and parts meet. Each section of a config is the argument list of one callable (`SECTIONS`),
and each method of `Job` makes one part, in a notebook as in `train`.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_flax import sharding, workdir
from vit_flax.augment import augment, normalize
from vit_flax.checkpoint import Checkpoints
from vit_flax.config import Config, ConfigError, bind, check_names, check_section, hparams_of, in_steps, plain
from vit_flax.data import Data, make_data
from vit_flax.evals import EVALS
from vit_flax.finetune import FromScratch, Init, Start
from vit_flax.hooks import Every, Hook
from vit_flax.losses import LOSSES
from vit_flax.models import make_model
from vit_flax.models.vit import ViT
from vit_flax.optim import make_optimizer
from vit_flax.step import TrainState, classification, init_state, train_step
from vit_flax.update_rules import RULES
from vit_flax.writer import TrainLog, Writer


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
    start: Start | FromScratch
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
        # As JSON, like the identity in a checkpoint that it is compared with: tuples are lists there.
        return json.loads(json.dumps({**workdir.identity(self.config), "data": self.data.fingerprint()}))

    def facts(self) -> dict[str, Any]:
        """What a user of the run's checkpoints needs besides its config."""
        return {"image_shape": self.data.image_shape, "class_names": self.data.class_names}

    def pretrained(self) -> dict[str, Any]:
        """The parameters that a new run takes from a checkpoint, by path; prints what became of all of them."""
        params, report = self.start.load(self.model, self.data.image_shape)
        if report is not None and jax.process_index() == 0:
            print(report, flush=True)
        return params

    def init(self, pretrained: Mapping[str, Any] | None = None) -> TrainState:
        """The state before the first step (to be jitted), with `pretrained` in the place of those initial parameters.

        Raises: ValueError: the model has no parameter of that name and shape.
        """
        h, w, c = self.data.image_shape
        image = jnp.zeros((1, h, w, c))
        return init_state(
            jax.random.key(self.run.seed),
            init=lambda key: _with(self.model.init(key, image, train=False)["params"], pretrained or {}),
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


# Section -> the callable whose signature is its schema (or a dict of them, by name), and the arguments that the
# program supplies itself.
SECTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "run": (Run, ()),
    "data": (make_data, ()),
    "model": (make_model, ("fields",)),
    "augment": (augment, ("key", "images", "targets")),
    "loss": (LOSSES, ("logits", "targets", "mask")),
    "optim": (make_optimizer, ("total_steps",)),
    "checkpoint": (Checkpoints, ("directory",)),
    "evals": (EVALS, ("apply", "normalize", "batches")),
    "init": (Init, ()),
}
OPTIONAL = ("init",)


def build(config: Config) -> Job:
    """Checks a config and turns it into parts; reads headers of the data and one picture, compiles nothing.

    Args:
      config: a ConfigDict or nested dicts, with the sections `SECTIONS`.

    Raises: ConfigError: names the key, what was found and what to do.
    """
    config = plain(config)
    check_names("", config, SECTIONS, required=[name for name in SECTIONS if name not in OPTIONAL])
    start = _make_start(config)
    with _named("init"):
        config = start.complete_data(config)
    check_section("data", config["data"], make_data)
    with _named("data"):
        data = make_data(**config["data"])
    if data.batch_size > data.num_train:
        raise ConfigError(
            f"data.batch_size={data.batch_size} is larger than the {data.num_train} examples of "
            f"{config['data']['train_split']!r}: choose a smaller batch or a larger split."
        )
    with _named("init"):
        config = start.complete_model(config, data.num_classes, data.image_shape)
    steps_per_epoch = data.num_train / data.batch_size
    evals = {f"evals.{name}": section for name, section in config["evals"].items()}
    given = {name: section for name, section in config.items() if name != "evals"} | evals
    sections = {name: in_steps(name, section, steps_per_epoch) for name, section in given.items()}
    for name, section in sections.items():
        _check(name, section)
    job = Job(
        config=config,
        run=Run(**sections["run"]),
        start=start,
        data=data,
        model=_make_model(sections, data),
        mesh=sharding.make_mesh(),
        sections=sections,
        hparams=hparams_of(sections),
    )
    with _named("the config"):
        jax.eval_shape(job.init)
    return job


def _make_start(config: Mapping[str, Any]) -> Start | FromScratch:
    if "init" not in config:
        return FromScratch()
    check_section("init", config["init"], Init)
    with _named("init"):
        return Start(config["init"])


def _with(params: Any, pretrained: Mapping[str, Any]) -> Any:
    """The parameters with some of them replaced."""
    flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    for path, value in pretrained.items():
        if path not in flat or flat[path].shape != value.shape:
            found = flat[path].shape if path in flat else "no such parameter"
            raise ValueError(f"init: the checkpoint gives {path} {value.shape}, the model of the run has {found}.")
        flat[path] = jnp.asarray(value, flat[path].dtype)
    return unflatten_dict(flat, sep="/")


def _check(name: str, section: Mapping[str, Any]) -> None:
    """Checks one section against the callable that it is for."""
    schema, supplied = SECTIONS[name.split(".")[0]]
    extra: set[str] = set()
    if name == "checkpoint" or name.startswith("evals."):
        extra.add("every_steps")
    if isinstance(schema, dict):  # the section names its callable
        which = "name" if name == "loss" else "type"
        check_names(f"{name}.", [which] if which in section else [], [which], required=[which])
        if section[which] not in schema:
            raise ConfigError(f"{name}.{which}={section[which]!r} is unknown: expected one of {', '.join(schema)}.")
        schema, extra = schema[section[which]], extra | {which}
    rule = {"optim": RULES.get(section.get("name", "")), "model": ViT}.get(name)
    check_section(name, section, schema, supplied=(*supplied, "parent"), also=rule, extra=extra)


def _make_model(sections: Mapping[str, Mapping[str, Any]], data: Data) -> ViT:
    """The model, checked against the data."""
    with _named("model"):
        model = make_model(**sections["model"])
    if model.num_classes != data.num_classes:
        names = ", ".join(data.class_names[:5])
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but the data has {data.num_classes} classes ({names}, ...). "
            f"Set model.num_classes={data.num_classes}."
        )
    return model


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Turns what a part says about its arguments into a ConfigError that names the section."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{section}: {error}") from error
