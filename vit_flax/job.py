"""From a config to the parts of a run: `build(config) -> Job`.

The one place where configs and parts meet. Each section of a config is the argument list of one callable
(`sections.SECTIONS`), and each method of `Job` makes one part, in a notebook as in `train`.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax import peak, pictures, sharding, workdir
from vit_flax.augment import augment, normalize
from vit_flax.bad_steps import BadSteps
from vit_flax.checks import check_evaluations, check_logits
from vit_flax.config import Config, ConfigError, bind, flatten, hparams_of, named, plain
from vit_flax.data import Ahead, Batches, Data, make_data
from vit_flax.evals import EVALS
from vit_flax.evals.hook import Evaluation, EvaluationHook
from vit_flax.files import write_atomically
from vit_flax.finetune import FromScratch, Init, Start, put_in
from vit_flax.hooks import Every, Hook, Profile
from vit_flax.losses import LOSSES, PROBABILITIES, as_evaluated
from vit_flax.models import make_model
from vit_flax.models.flops import forward_flops
from vit_flax.models.vit import ViT
from vit_flax.optim import ema_update, eval_params, make_optimizer
from vit_flax.param_groups import ParameterGroup, layer_norms, make_groups, parameter_groups
from vit_flax.schedules import make_schedule
from vit_flax.sections import SCHEDULES, SPLIT, Run, arguments, check_outline
from vit_flax.signals import StopSignal
from vit_flax.signature import check_section
from vit_flax.sinks import SINKS, Sink
from vit_flax.sinks.files import Files
from vit_flax.step import OBJECTIVES, TrainState, augment_key, init_state, train_step
from vit_flax.train_log import TrainLog
from vit_flax.typing import PyTree
from vit_flax.writer import Writer


def build(
    config: Config,
    devices: Sequence[Any] | None = None,
    *,
    completed: Config | None = None,
    stop_after: int | None = None,
) -> "Job":
    """Checks a config and turns it into parts; reads headers of the data and one picture, compiles nothing.

    Args:
      config: a ConfigDict or nested dicts, with the sections of `sections.SECTIONS`.
      devices: to run on; all there are where it is None.
      completed: what an earlier life of the run made of this config with a checkpoint (see `workdir.completed`).
      stop_after: training stops after this step; schedules are those of the whole run.

    Raises: ConfigError: names the key, what was found and what to do.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"{stop_after=}: expected the number of a step, from 1 on, or None for the whole run.")
    written = plain(config)
    config = {"mesh": {}} | plain(completed or config)
    check_outline(config)
    with named("init"):
        start = _make_start(config)
        config = start.complete_data(config)
    check_section("data", config["data"], make_data)
    with named("data"):
        data = make_data(**config["data"])
        image_shape = data.image_shape
    if data.batch_size > data.num_train:
        raise ConfigError(
            f"data.batch_size={data.batch_size} is larger than the {data.num_train} examples of "
            f"{config['data']['train_split']!r}: choose a smaller batch or a larger split."
        )
    with named("init"):
        config = start.complete_model(config, data.class_names, image_shape)
    sections = arguments(config, steps_per_epoch=data.num_train / data.batch_size)
    with named("run"):
        run = Run(**sections["run"])
    with named("mesh"):
        mesh = sharding.make_mesh(**sections["mesh"], devices=devices)
    with named("data"):
        sharding.check_batch_size("data.batch_size", data.batch_size, mesh, run.accumulate_steps)
        sharding.check_batch_size("data.eval_batch_size", data.eval_batch_size, mesh)
    job = Job(
        given=written,
        config=config,
        run=run,
        start=start,
        data=data,
        model=_make_model(sections, data),
        mesh=mesh,
        sections=sections,
        hparams=hparams_of(sections),
        stop_after=stop_after,
    )
    _check_parts(job)
    return job


@dataclasses.dataclass(frozen=True)
class Job:
    """A config turned into parts. Nothing expensive has happened yet; each method makes one part."""

    given: dict[str, Any]  # the config as it was written, before a checkpoint completed it
    config: dict[str, Any]
    run: Run
    start: Start | FromScratch
    data: Data
    model: ViT
    mesh: jax.sharding.Mesh
    sections: dict[str, dict[str, Any]]
    hparams: dict[str, float]
    stop_after: int | None  # a step before the last one, such as one where a search compares runs

    @property
    def last_step(self) -> int:
        """Number of the step that training stops after; evaluated and saved as the last one of the run is."""
        return min(self.run.total_steps, self.stop_after or self.run.total_steps)

    @property
    def checkpoint(self) -> dict[str, Any]:
        """Arguments of `Checkpoints`."""
        return {k: v for k, v in self.sections["checkpoint"].items() if k not in SCHEDULES}

    def every(self, section: str, action: Callable[[int, TrainState], Any]) -> Every:
        """An action on the schedule that a section of the config gives."""
        schedule = {key: self.sections[section][key] for key in SCHEDULES if key in self.sections[section]}
        return Every(action, total_steps=self.last_step, **schedule)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two processes to be two lives of one run."""
        return {**workdir.identity(self.config), "data": self.data.fingerprint()}

    def about(self) -> dict[str, Any]:
        """What somebody who opens a checkpoint wants to know; JSON values."""
        preprocessing = {
            "image_shape": list(self.data.image_shape),
            "transforms": [dict(op) for op in self.config["data"]["eval_transforms"]],
            "mean": list(self.sections["augment"]["mean"]),
            "std": list(self.sections["augment"]["std"]),
        }
        return {"config": self.config, "class_names": list(self.data.class_names), "preprocessing": preprocessing}

    def pretrained(self) -> dict[str, Any]:
        """The parameters that a new run takes from a checkpoint, by path; prints what became of all of them."""
        params, report = self.start.load(self.model, self.data.class_names, self.data.image_shape)
        if report is not None and jax.process_index() == 0:
            print(report, flush=True)
        return params

    def init(self, pretrained: Mapping[str, Any] | None = None) -> TrainState:
        """The state before the first step (to be jitted), with what `pretrained` gave in its place."""
        return self.init_from(*self.init_arguments(), pretrained or {})

    def init_arguments(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The key of the run and the numbers that a sweep may vary."""
        hparams = {name: jnp.asarray(value, jnp.float32) for name, value in self.hparams.items()}
        return jax.random.key(self.run.seed), hparams

    def init_from(self, key: jax.Array, hparams: dict[str, jax.Array], pretrained: Mapping[str, Any]) -> TrainState:
        """The state before the first step of a run with that key and those numbers."""
        return init_state(
            key,
            init=lambda key: put_in(self.init_params(key), pretrained),
            optimizer=self.optimizer(),
            hparams=hparams,
        )

    def init_params(self, key: jax.Array) -> PyTree:
        """The parameters as the model initialises them."""
        return self.model.init(key, jnp.zeros((1, *self.data.image_shape)), train=False)["params"]

    @cached_property
    def param_shapes(self) -> PyTree:
        """Shapes and dtypes of the parameters; tracing the model is slow, and this is asked for in many places."""
        return jax.eval_shape(self.init_params, self.init_arguments()[0])

    @property
    def normalize(self) -> Callable[..., Any]:
        """uint8 images to the model's input, in evaluations."""
        return partial(normalize, **{k: self.sections["augment"][k] for k in ("mean", "std")})

    @property
    def apply(self) -> Callable[..., Any]:
        """`model.apply` on the mesh."""
        return sharding.keep_batch_cut(self.model.apply, self.mesh)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and places of the state, as `jax.ShapeDtypeStruct`s."""

        def zeros(_: jax.Array) -> PyTree:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.param_shapes)

        key, hparams = self.init_arguments()
        make = partial(init_state, init=zeros, optimizer=self.optimizer(), hparams=hparams)
        abstract = jax.eval_shape(make, key)
        shardings = sharding.state_sharding(abstract, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

    def abstract_batch(self) -> dict[str, Any]:
        """The same of a training batch."""
        label = np.shape(self.data.train_source[0]["label"])  # () or, of data with several labels, (v,)
        kinds = {
            "image": (self.data.image_shape, np.uint8),
            "label": (label, np.uint8 if label else np.int32),
            "mask": ((), np.bool_),
        }
        rows, b = sharding.batch_sharding(self.mesh), self.data.batch_size
        return {k: jax.ShapeDtypeStruct((b, *shape), kind, sharding=rows) for k, (shape, kind) in kinds.items()}

    def optimizer(self) -> Callable[..., Any]:
        """`hparams -> GradientTransformation`."""
        section = {**self.sections["optim"], "total_steps": self.run.total_steps}
        make = bind(make_optimizer, "optim", section)
        return lambda hparams: make(hparams=hparams)

    def parameter_groups(self, params: PyTree) -> list[ParameterGroup]:
        """The parameters (or their shapes) by how the optimiser treats them."""
        section = self.sections["optim"]
        return parameter_groups(params, make_groups(params, **_taken_by(make_groups, section)), section["weight_decay"])

    @property
    def loss(self) -> Callable[..., Any]:
        """`(logits, targets, mask, hparams=) -> mean loss`."""
        section = {k: v for k, v in self.sections["loss"].items() if k != "name"}
        return bind(LOSSES[self.sections["loss"]["name"]], "loss", section)

    def step(self) -> Callable[..., Any]:
        """`(state, batch) -> (state, metrics)` (to be jitted)."""
        section = self.sections.get("objective", {"name": "classification"})
        objective = partial(
            OBJECTIVES[section["name"]],
            **{k: v for k, v in section.items() if k != "name"},
            apply=bind(self.apply, "model", {}),
            augment=bind(augment, "augment", self.sections["augment"]),
            loss=self.loss,
            num_classes=self.data.num_classes,
        )
        return partial(
            train_step,
            objective=objective,
            optimizer=self.optimizer(),
            accumulate_steps=self.run.accumulate_steps,
            ema_update=partial(ema_update, warmup=self.run.ema_warmup),
            **(dict(layer_norms=layer_norms) if self.run.log_layer_norms else {}),
        )

    def train_step(self) -> Callable[..., Any]:
        """The jitted step on the mesh; the state is donated."""
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(self.step(), donate_argnums=0, out_shardings=(places, sharding.everywhere(self.mesh)))

    def host_batches(self, start_step: int) -> Batches:
        """This process's rows of the batches from `start_step` on."""
        seed = self.run.seed if self.run.data_seed is None else self.run.data_seed
        index, count = sharding.data_shard(self.mesh)
        return self.data.train(seed=seed, start_step=start_step, process_index=index, process_count=count)

    def train_batches(self, start_step: int) -> Ahead:
        """Batches on the devices from `start_step` on; one is always on its way while another is worked on."""
        put = partial(sharding.put_batch, mesh=self.mesh, global_batch_size=self.data.batch_size)
        return Ahead(self.host_batches(start_step), put, count_skipped=self.data.reading["on_error"] == "skip")

    def draw(self, batch: dict[str, jax.Array], writer: Writer) -> None:
        """Gives the writer a picture of the first batch, as the first step augments it."""
        if not writer.active:
            return
        # Of several processes this one has its own rows only: an image's partner in a mix may be another one's.
        rows = batch if jax.process_count() == 1 else {k: sharding.local_rows(batch[k]) for k in ("image", "label")}
        images, targets = (np.asarray(array[:24]) for array in self.augmented(rows, 0))
        captions = [pictures.caption(target, self.data.class_names) for target in targets]
        writer.picture(1, "train/batch", pictures.grid(self.visible(images), captions))

    def visible(self, images: np.ndarray) -> np.ndarray:
        """The model's input as pixels, uint8: the inverse of `normalize`."""
        mean, std = (np.asarray(self.sections["augment"][k], np.float32) for k in ("mean", "std"))
        return np.clip(np.round((images * std + mean) * 255), 0, 255).astype(np.uint8)

    def augmented(self, batch: Mapping[str, Any], step: int) -> tuple[jax.Array, jax.Array]:
        """Images and targets as the step after `step` steps makes them of a batch; of its first part if it has any."""
        parts = self.run.accumulate_steps
        images, labels = (batch[name][::parts] for name in ("image", "label"))
        targets = labels.astype(np.float32) if labels.ndim == 2 else jax.nn.one_hot(labels, self.data.num_classes)
        _, train_key = jax.random.split(jax.random.key(self.run.seed))  # as in `init_state`
        change = jax.jit(bind(augment, "augment", {**self.sections["augment"], "dtype": np.float32}))
        return change(augment_key(train_key, step, parts), images, targets, hparams=self.init_arguments()[1])

    def writer(self, folder: Path | None, *, start_step: int, quiet: bool = False) -> Writer:
        """The console (unless `quiet`) and, where there is a folder, the files and the sinks of the config."""
        if folder is None:
            return Writer(None, {}, start_step=start_step, total_steps=self.run.total_steps, quiet=quiet)
        supplied = {"workdir": folder, "start_step": start_step, "config": flatten(self.config)}
        sinks: dict[str, Callable[[], Sink]] = {"files": partial(Files, workdir=folder, start_step=start_step)}
        for section in self.sections:
            kind, _, name = section.partition(".")
            if kind == "sinks":
                sinks[name] = partial(SINKS[name], **_taken_by(SINKS[name], supplied), **self.sections[section])
        return Writer(folder, sinks, start_step=start_step, total_steps=self.run.total_steps, quiet=quiet)

    def train_log(self, writer: Writer, open_interval: Mapping[str, Any], last: dict[str, float]) -> TrainLog:
        """Averages and writes the metrics of the steps; goes on with what an earlier process left (see `TrainLog`)."""
        found = peak.find_peak(self.run.peak_tflops, jnp.dtype(self.model.dtype).name)
        if found is not None:
            writer.say(f"MFU is a part of {found[0] / 1e12:,.1f} TFLOP/s per device ({found[1]}).")
        facts = self.facts() | {"peak_flops": found and found[0], "peak_source": found and found[1]}
        if writer.workdir is not None and writer.active:
            write_atomically(writer.workdir / "facts.json", json.dumps(facts, indent=2) + "\n")
        return TrainLog(
            writer,
            every_steps=self.run.log_every_steps,
            batch_size=self.data.batch_size,
            total_steps=self.run.total_steps,
            start_step=writer.start_step,
            open_interval=open_interval,
            last=last,
            learning_rates=self.learning_rates(),
            mfu_per_image_per_sec=found and facts["train_flops_per_image"] / (found[0] * facts["num_devices"]),
        )

    def bad_steps(self, writer: Writer) -> BadSteps:
        """Reports steps that are not finite, and ends the run after too many."""
        assert writer.workdir is not None
        return BadSteps(
            max_in_a_row=self.run.max_skipped_steps,
            folder=writer.workdir / "bad_batches",
            max_dumps=self.run.dump_bad_batches,
            say=writer.say,
        )

    def learning_rates(self) -> np.ndarray:
        """The learning rate of each step of the run, before any factor per parameter."""
        section = _taken_by(make_schedule, self.sections["optim"])
        schedule = make_schedule(**section, total_steps=self.run.total_steps)
        return np.asarray(jax.jit(schedule)(np.arange(self.run.total_steps)))

    def facts(self) -> dict[str, Any]:
        """What the config does not say and a report wants to; JSON values."""
        return {
            "total_steps": self.run.total_steps,
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(self.param_shapes)),
            "train_flops_per_image": 3 * self.forward_flops(),
            "num_train_examples": self.data.num_train,
            "image_shape": list(self.data.image_shape),
            "device_kind": jax.devices()[0].device_kind,
            "num_devices": jax.device_count(),
        }

    def forward_flops(self) -> float:
        """Floating-point operations of the logits of one image."""
        (h, w, c), (ph, pw) = self.data.image_shape, self.model.patch_shape
        return forward_flops(self.model, (h // ph, w // pw), channels=c)

    @cached_property
    def evaluated(self) -> dict[str, Data]:
        """What each entry of `evals` is evaluated on, in its order; the same object for the same split."""
        main = self.config["data"]["eval_split"]
        splits, found = {main: self.data}, {}
        for name in self.config["evals"]:
            split = self.sections[f"evals.{name}"].get(SPLIT, main)
            if split not in splits:
                with named(f"evals.{name}"):
                    splits[split] = self.data.evaluated_on(split)
            found[name] = splits[split]
        return found

    def evaluations(self, stop: StopSignal) -> dict[str, Evaluation]:
        """One for each entry of `evals`, in its order."""
        index, count = sharding.data_shard(self.mesh)
        sections = {name: self.sections[f"evals.{name}"] for name in self.config["evals"]}
        # A small split is decoded into memory: once, whoever evaluates on it.
        splits = {data: data.eval(process_index=index, process_count=count) for data in set(self.evaluated.values())}
        return {
            name: EVALS[section["type"]](
                **{k: v for k, v in section.items() if k not in ("type", SPLIT, *SCHEDULES)},
                apply=self.apply,
                normalize=self.normalize,
                batches=partial(stop.until_received, splits[self.evaluated[name]]),
                put=partial(sharding.put_batch, mesh=self.mesh, global_batch_size=self.data.eval_batch_size),
                rows=sharding.batch_sharding(self.mesh),
                num_classes=self.data.num_classes,
                loss=as_evaluated(**self.sections["loss"]),
                probabilities=PROBABILITIES[self.sections["loss"]["name"]],
            )
            for name, section in sections.items()
        }

    def evaluation_hooks(
        self, evaluations: Mapping[str, Evaluation], writer: Writer, log: TrainLog | None, results: dict[str, float]
    ) -> dict[str, Every]:
        """Runs each evaluation when it is due, writes its metrics and puts them into `results`."""

        def hook(name: str, evaluation: Evaluation) -> Every:
            run = EvaluationHook(
                name,
                evaluation,
                weights=eval_params,
                writer=writer,
                log=log,
                results=results,
                class_names=self.data.class_names,
                example_id=lambda row: str(self.evaluated[name].eval_source[row]["id"]),
            )
            return self.every(f"evals.{name}", run)

        return {name: hook(name, evaluation) for name, evaluation in evaluations.items()}

    def profile(self, writer: Writer) -> Hook:
        """Records a trace of the profiler, where the config asks for one; of several processes, the first one does."""
        if self.run.profile_steps is None or writer.workdir is None or not writer.active:
            return lambda step, state: None
        hook = Profile(self.run.profile_steps, folder=writer.workdir / "profile", say=writer.say)
        writer.closing.callback(hook.close)
        return hook


def _taken_by(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some keyword arguments that a function takes."""
    return {k: v for k, v in arguments.items() if k in inspect.signature(function).parameters}


def _check_parts(job: Job) -> None:
    """Makes, or traces without computing, every part that would otherwise fail when it is first used."""
    for name in ("checkpoint", *(f"evals.{name}" for name in job.config["evals"])):
        with named(name):
            job.every(name, lambda step, state: None)
    check_evaluations(
        job.config["evals"],
        several_labels=np.ndim(job.data.train_source[0]["label"]) > 0,
        keeps_average=bool(job.run.ema_decay),
        best_metric=job.sections["checkpoint"].get("best_metric"),
    )
    key, hparams = job.init_arguments()
    with named("model"):
        params = job.param_shapes
    with named("optim"):
        jax.eval_shape(job.optimizer()(hparams).init, params)
    with named("mesh"):
        sharding.param_shardings(params, job.mesh)
    batch = job.abstract_batch()
    targets = jax.ShapeDtypeStruct((job.data.batch_size, job.data.num_classes), np.float32)
    change = bind(augment, "augment", job.sections["augment"])
    with named("augment"):
        jax.eval_shape(change, key, batch["image"], targets, hparams=hparams)
    for data in dict.fromkeys((job.data, *job.evaluated.values())):
        check_logits(job.model, params, data, job.normalize)
    with named("loss"):
        jax.eval_shape(job.loss, targets, targets, batch["mask"], hparams=hparams)


def _make_start(config: Mapping[str, Any]) -> Start | FromScratch:
    if "init" not in config:
        return FromScratch()
    check_section("init", config["init"], Init)
    return Start(config["init"])


def _make_model(sections: Mapping[str, Mapping[str, Any]], data: Data) -> ViT:
    """The model, checked against the data."""
    with named("model"):
        model = make_model(**sections["model"])
    if model.num_classes != data.num_classes:
        names = ", ".join(data.class_names[:5])
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but the data has {data.num_classes} classes ({names}, ...). "
            f"Set model.num_classes={data.num_classes}."
        )
    return model
