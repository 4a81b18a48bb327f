"""The sections of a config: which callable each one is for, and each as that callable's keyword arguments."""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_flax import peak, sharding
from vit_flax.augment import augment
from vit_flax.checkpoint import Checkpoints
from vit_flax.config import ConfigError, flatten, in_steps, named
from vit_flax.data import make_data
from vit_flax.evals import EVALS
from vit_flax.finetune import Init
from vit_flax.hooks import check_profile_steps
from vit_flax.losses import LOSSES
from vit_flax.models import make_model
from vit_flax.models.vit import ViT
from vit_flax.optim import make_optimizer
from vit_flax.signature import check_names, check_section
from vit_flax.sinks import SINKS, check_installed
from vit_flax.step import OBJECTIVES, classification
from vit_flax.update_rules import RULES


@dataclasses.dataclass(frozen=True)
class Run:
    """The `run` section.

    Attributes:
      seed: of the parameters, the data order and all randomness in training.
      data_seed: of the data order and the randomness on the host alone; None for `seed`. With one, runs of several
        seeds see the same batches, and a sweep can train them as one program.
      total_steps: of the run; `total_epochs` in a config.
      log_every_steps: length of the intervals over which training metrics are averaged.
      accumulate_steps: a batch is cut into so many parts, to save memory.
      ema_decay: of a moving average of the parameters, evaluated beside them; 0 for none.
      ema_warmup: early steps keep less of the average, at most (1 + step) / (10 + step); DeiT's recipe does not.
      log_layer_norms: also the norms of gradient and update of each block and of each module outside the blocks.
      peak_tflops: of one device, for MFU: "known" (from a table; no MFU where the device is not in it), "measured" (at
        the start) or a number. See `peak`.
      profile_steps: number of the first and of the last step of a profiler trace, from 2 on; None for no trace.
      max_skipped_steps: stops the run after so many steps in a row that were not finite.
      dump_bad_batches: keeps so many of the batches of such steps in the workdir, to look at.
    """

    seed: int
    total_steps: int
    log_every_steps: int
    data_seed: int | None = None
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    ema_warmup: bool = True
    log_layer_norms: bool = False
    peak_tflops: float | str = "known"
    profile_steps: Sequence[int] | None = None
    max_skipped_steps: int = 10
    dump_bad_batches: int = 0

    def __post_init__(self) -> None:
        peak.check(self.peak_tflops)
        if self.profile_steps is not None:
            check_profile_steps(self.profile_steps, self.total_steps)


# Section -> the callable whose signature is its schema (or a dict of them, by name), and the arguments that the
# program supplies itself.
SECTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "run": (Run, ()),
    "data": (make_data, ()),
    "model": (make_model, ("fields",)),
    "augment": (augment, ("key", "images", "targets")),
    "loss": (LOSSES, ("logits", "targets", "mask")),
    "objective": (OBJECTIVES, tuple(inspect.signature(classification).parameters)),
    "optim": (make_optimizer, ("total_steps",)),
    "checkpoint": (Checkpoints, ("directory",)),
    "evals": (EVALS, ("apply", "normalize", "batches", "put", "rows", "num_classes", "loss", "probabilities")),
    "mesh": (sharding.make_mesh, ("devices",)),
    "sinks": (SINKS, ("workdir", "start_step", "config")),
    "init": (Init, ()),
}
# Of these, a section that happens every so often has exactly one (`every_epochs` becomes `every_steps`).
SCHEDULES = ("every_steps", "every_secs")
# What an evaluation may have beside its schedule and its arguments: another split than `data.eval_split`.
SPLIT = "split"
# Sections that a config may leave out. `metrics.jsonl` and `pictures/` are written without a sink.
OPTIONAL = ("init", "mesh", "objective", "sinks")
DEFAULT_SINKS: dict[str, dict[str, Any]] = {"csv": {}, "tensorboard": {}}


def check_outline(config: Mapping[str, Any]) -> None:
    """Checks that a config has the sections that it needs and no others, and that its evaluations have usable names.

    Raises: ConfigError: names what is unknown, missing, no section, or no name for figures and files.
    """
    needed = [name for name in SECTIONS if name not in OPTIONAL]
    check_names("", config, SECTIONS, required=needed, elsewhere=flatten(config))
    nested = {}
    for kind in ("evals", "sinks"):
        if isinstance(entries := config.get(kind), Mapping):
            nested |= {f"{kind}.{name}": section for name, section in entries.items()}
    for name, section in {**config, **nested}.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name}: expected a section with keys, found {section!r}.")
    for name in config["evals"]:
        if not re.fullmatch(r"[\w.-]*\w", name) or name == "train":
            raise ConfigError(
                f"evals.{name}: the name of an evaluation starts the names of its figures and of its files: use "
                "letters, digits, '_', '-' and '.', and not 'train', which is the training itself."
            )


def arguments(config: Mapping[str, Any], steps_per_epoch: float) -> dict[str, dict[str, Any]]:
    """Section -> keyword arguments of its callable, checked; each evaluation and sink is a section ("evals.test").

    Args:
      config: see `check_outline`.
      steps_per_epoch: turns the durations that are given in epochs into steps.

    Raises: ConfigError: names the key, what was found and what to do.
    """
    sinks = config.get("sinks", DEFAULT_SINKS)
    check_names("sinks.", sinks, SINKS)
    given = {name: section for name, section in config.items() if name not in ("evals", "sinks")}
    given |= {f"evals.{name}": section for name, section in config["evals"].items()}
    given |= {f"sinks.{name}": section for name, section in sinks.items()}
    sections = {name: in_steps(name, section, steps_per_epoch) for name, section in given.items()}
    for name, section in sections.items():
        _check(name, section)
    return sections


def _check(name: str, section: Mapping[str, Any]) -> None:
    """Checks one section against the callable that it is for."""
    kind, _, key = name.partition(".")
    schema, supplied = SECTIONS[kind]
    extra: set[str] = set()
    if kind in ("checkpoint", "evals"):
        extra.add("every_secs" if "every_secs" in section else "every_steps")
    if kind == "evals" and SPLIT in section:
        extra.add(SPLIT)
        if not isinstance(section[SPLIT], str):
            raise ConfigError(f"{name}.{SPLIT}={section[SPLIT]!r}: expected a string, such as 'test'.")
    if kind == "sinks":
        schema = SINKS[key]
        with named(name):
            check_installed(key)
    elif isinstance(schema, dict):  # the section names its callable
        which = "type" if kind == "evals" else "name"
        check_names(f"{name}.", [which] if which in section else [], [which], required=[which])
        if section[which] not in schema:
            raise ConfigError(f"{name}.{which}={section[which]!r} is unknown: expected one of {', '.join(schema)}.")
        schema, extra = schema[section[which]], extra | {which}
    rule = {"optim": RULES.get(section.get("name", "")), "model": ViT}.get(name)
    check_section(name, section, schema, supplied=(*supplied, "parent"), also=rule, extra=extra)
