"""Reading a config: every section is the argument list of one callable, and its signature is the schema.

A key that the callable does not take, one that it needs and does not get, and a value of another type than its
annotation are `ConfigError`s that name the key, before anything expensive starts.
"""

import contextlib
import difflib
import inspect
import math
import os
import re
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vit_flax.limits import NOT_NEGATIVE, outside

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


def check_names(
    where: str, given: Iterable[str], known: Iterable[str], required: Iterable[str] = (), elsewhere: Iterable[str] = ()
) -> None:
    """Raises a ConfigError that lists the names that are unknown, each with the nearest known one, or missing.

    Args:
      where: what the names begin with, such as "optim.".
      given: the names.
      known: those that there are.
      required: those that must be given.
      elsewhere: dotted keys; one whose last part is an unknown name is the nearest.
    """
    given, known = list(given), list(known)
    problems = []
    for name in given:
        if name not in known:
            near = [key for key in elsewhere if key.endswith(f".{name}")] or difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown key {where}{name}" + (f": did you mean {where}{near[0]}?" if near else ""))
    problems += [f"missing key {where}{name}" for name in required if name not in given]
    if problems:
        raise ConfigError("\n".join([*problems, f"Keys of {where.rstrip('.') or 'the config'}: {', '.join(known)}."]))


def check_sections(config: Mapping[str, Any]) -> None:
    """Checks that sections are sections, and that evaluations have names that files and figures can bear."""
    entries = {kind: config.get(kind) for kind in ("evals", "sinks")}
    nested = {
        f"{kind}.{k}": v for kind, names in entries.items() if isinstance(names, Mapping) for k, v in names.items()
    }
    for name, section in {**config, **nested}.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name}: expected a section with keys, found {section!r}.")
    for name in config["evals"]:
        if not re.fullmatch(r"[\w.-]*\w", name) or name == "train":
            raise ConfigError(
                f"evals.{name}: the name of an evaluation starts the names of its figures and of its files: use "
                "letters, digits, '_', '-' and '.', and not 'train', which is the training itself."
            )


@contextlib.contextmanager
def named(section: str) -> Iterator[None]:
    """Turns what a part says about its arguments into a ConfigError that names the section."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        raise ConfigError(f"{section}: {error}") from error


def check_section(
    name: str,
    section: Mapping[str, Any],
    schema: Callable[..., Any],
    *,
    supplied: Iterable[str] = (),
    also: Callable[..., Any] | None = None,
    extra: Iterable[str] = (),
) -> None:
    """Checks that a section could be passed to `schema` as its keyword arguments.

    Args:
      name: of the section, for messages.
      section: keys and values.
      schema: the callable whose signature is the schema.
      supplied: arguments that the program passes itself; not allowed in the section.
      also: a second callable, which gets what the first one takes as `**kwargs`.
      extra: keys that the program itself reads.

    Raises: ConfigError: unknown, missing or mistyped keys, values outside `limits.LIMITS`.
    """
    parameters = {
        p.name: p
        for function in (schema, also)
        if function is not None
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in supplied
    }
    own = [p for p in inspect.signature(schema).parameters.values() if p.name in parameters]
    required = [p.name for p in own if p.default is p.empty]
    check_names(f"{name}.", section, [*parameters, *extra], [*required, *extra])
    for key in parameters.keys() & section.keys():
        value, expected = section[key], parameters[key].annotation
        if expected is not inspect.Parameter.empty and not _fits(value, expected):
            raise ConfigError(
                f"{name}.{key}: expected {_in_words(expected)}, found {value!r} ({type(value).__name__})."
            )
    problems = [outside(name, key, value) for key, value in flatten(section).items()]
    if any(problems):
        raise ConfigError("\n".join(filter(None, problems)))


def _in_words(annotation: Any) -> str:
    """A type as a user would write it; an array or the number that may be traced in its place is "a number"."""
    parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    words = []
    for part in parts:
        if _is_array(part) or part is complex:
            continue
        if _is_union(part):
            words.append(_in_words(part))
        elif part is type(None):
            words.append("None")
        elif typing.get_origin(part) is typing.Literal:
            words += map(repr, typing.get_args(part))
        else:
            words.append(
                part.__name__ if not typing.get_args(part) else re.sub(r"\b(typing|collections\.abc)\.", "", str(part))
            )
    return "a number" if {"int", "float", "bool"} <= {*words} else " or ".join(dict.fromkeys(words))


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_array(annotation: Any) -> bool:
    """Whether a type is the traced form of a number; a config holds plain numbers."""
    words = re.findall(r"\w+", f"{annotation!r} {type(annotation)!r}")
    return bool({"jax", "jaxlib", "jaxtyping", "numpy"} & {*words})


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a config value fits an annotation made of built-in types; anything else is left to the callable."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, str):
        return True
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return any(_fits(value, a) for a in args)
    if _is_array(annotation) or annotation is complex:
        return False
    if origin is typing.Literal:
        return value in args
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    base = origin or annotation
    if base in (tuple, list) or (isinstance(base, type) and issubclass(base, typing.Sequence) and base is not str):
        return isinstance(value, (tuple, list))
    if base is dict or (isinstance(base, type) and issubclass(base, Mapping)):
        return isinstance(value, Mapping)
    return isinstance(value, base) if base in (str, bool) else True


def in_steps(name: str, section: Mapping[str, Any], steps_per_epoch: float) -> dict[str, Any]:
    """The section with every duration `<x>_epochs` turned into `<x>_steps`, to the nearest step.

    Distances (`every_epochs`) are rounded up, so that n of them do not end a step or two before n times as many epochs:
    what is due at the end of a run would be done twice. `keep_every_epochs` is a multiple of that of saves.

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
