"""Configs: nested dicts out of a Python file, their durations in steps, and the numbers that a sweep may vary."""

import contextlib
import math
import os
import runpy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vit_flax.limits import NOT_NEGATIVE

if TYPE_CHECKING:  # expanding a sweep of a thousand points must not cost an import of JAX
    from vit_flax.typing import Array

Config = ConfigDict | Mapping[str, Any]

# The numbers that a sweep may vary without another program: they reach the step as traced values (see TrainState).
HPARAMS = (
    "optim.lr",
    "optim.weight_decay",
    "optim.clip_norm",
    "model.drop_path",
    "loss.label_smoothing",
    "augment.mixup_alpha",
    "augment.cutmix_alpha",
    "run.ema_decay",
)


class ConfigError(ValueError):
    """The config cannot be run; the message names the key, what was found and what to do."""


def plain(config: Config) -> dict[str, Any]:
    """The config as nested dicts. Raises: ConfigError: it is none, such as the name of a file."""
    if not isinstance(config, ConfigDict | Mapping):
        file = isinstance(config, str | os.PathLike)
        read = f": vit_flax.config.load_config({os.fspath(config)!r}) reads a file" if file else ""
        raise ConfigError(f"expected a config, a ConfigDict or nested dicts, found {config!r}{read}.")
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def load_config(name: str) -> ConfigDict:
    """The config of a file, `file.py` or `file.py:argument`.

    Raises: ConfigError: there is no such file; it has no get_config(), raises, or returns no config.
    """
    file, _, argument = name.partition(":")
    get_config = run_file(file, "a config").get("get_config")
    if not callable(get_config):
        raise ConfigError(f"{file} has no get_config(): a config file is Python with a function that returns a config.")
    with naming_lines(file):
        config = get_config(argument) if argument else get_config()
    if not isinstance(config, ConfigDict | Mapping):
        raise ConfigError(f"get_config() of {file} returned {config!r}: expected a ConfigDict.")
    return ConfigDict(plain(config))


def run_file(file: str, what: str) -> dict[str, Any]:
    """The names that a Python file of the user defines. Raises: ConfigError: it is not there, or raises."""
    if not os.path.isfile(file):
        raise ConfigError(f"There is no file {file} ({what}). Run from the root of the project, or give its path.")
    with naming_lines(file):
        return runpy.run_path(file)


@contextlib.contextmanager
def naming_lines(file: str) -> Iterator[None]:
    """Turns whatever a file of the user raises into a ConfigError that names the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(raised_in(file, error) or f"{file}: {type(error).__name__}: {error}") from error


def raised_in(file: str, error: BaseException | None) -> str | None:
    """The line of a file at which an error, or the one behind it, was raised, and that error; None if there is none."""
    while error is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno]
        if lines:
            return f"{file}, line {lines[-1]}, raises\n{traceback.format_exception_only(error)[-1].strip()}"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def named(section: str) -> Iterator[None]:
    """Turns what a part says about its arguments into a ConfigError that names the section."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        raise ConfigError(f"{section}: {error}") from error


def in_steps(name: str, section: Mapping[str, Any], steps_per_epoch: float) -> dict[str, Any]:
    """The section with every duration `<x>_epochs` turned into `<x>_steps`, to the nearest step.

    Distances (`every_epochs`) are rounded up. Rounded down, the last one might end a step or two before the run does,
    and what is due at the end would be done twice. `keep_every_epochs` becomes a multiple of the distance of saves.

    Raises: ConfigError: one duration given in both units, or one that is no number of epochs.
    """
    for key, value in section.items():
        if key.endswith("_epochs"):
            steps = key.removesuffix("_epochs") + "_steps"
            if steps in section:
                raise ConfigError(f"{name} gives both {key} and {steps}: remove one of them.")
            if not (value is None or NOT_NEGATIVE.allows(value)):
                raise ConfigError(f"{name}.{key}={value!r}: expected {NOT_NEGATIVE.expected}, in epochs.")

    def to_steps(key: str, epochs: float) -> int:
        every = section.get("every_epochs")
        if key == "every_epochs":
            return math.ceil(epochs * steps_per_epoch - 1e-6)
        if key == "keep_every_epochs" and every:
            return max(1, round(epochs / every)) * max(1, to_steps("every_epochs", every))
        return round(epochs * steps_per_epoch)

    out = {}
    for key, value in section.items():
        if key.endswith("_epochs"):
            number = None if value is None else max(1, to_steps(key, value)) if value else 0
            out[key.removesuffix("_epochs") + "_steps"] = number
        else:
            out[key] = value
    return out


def replace_durations(config: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The config without the durations that are given in another unit: `run.total_steps` replaces `run.total_epochs`.

    Args:
      config: nested dicts, with what is given in them.
      given: the dotted keys that a command line or a point of a sweep overrides.
    """
    units, given = ("_epochs", "_steps", "_secs"), set(given)
    replaced = {key.rpartition("_")[0] + unit for key in given if key.endswith(units) for unit in units} - given

    def kept(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: kept(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in section.items()
            if f"{prefix}{key}" not in replaced
        }

    return kept(config, "")


def hparams_of(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The values of `HPARAMS` that are set and not zero; what is off is absent, and costs nothing."""
    values = {}
    for name in HPARAMS:
        section, key = name.split(".")
        value = sections[section].get(key)
        if value:
            if not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, found {value}.")
            values[name] = float(value)
    return values


def bind(function: Callable[..., Any], name: str, section: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` with the section as keyword arguments, where traced `hparams` take the place of the numbers."""

    def bound(*args: Any, hparams: "Mapping[str, Array]", **kwargs: Any) -> Any:
        traced = {k.removeprefix(f"{name}."): v for k, v in hparams.items() if k.startswith(f"{name}.")}
        return function(*args, **{**section, **traced, **kwargs})

    return bound


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists and tuples stay whole (as lists)."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
