"""From a sweep file to its points: expanded, checked and named, without importing JAX.

A sweep file is Python with a docstring (hypothesis, deciding metric, budget) and

    BASE = "configs/digits.py"            # a config file, `file.py:argument` as on the command line
    def sweep(): yield {"optim.lr": 1e-3}  # a generator of dotted overrides, in plain loops
    def metrics(): return ["test/top1"]    # what to compare; the first one decides. "-test/loss" for smaller is better

In place of `sweep`, for a search with Optuna:

    def suggest(trial): return {"optim.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}  # the overrides of a trial
"""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_flax.config import ConfigError, flatten, load_config, naming_lines, replace_durations, run_file

DEFAULT = "default"  # stands for the value of a key that neither a point nor the base sets
MAX_NAME = 200  # characters; file systems allow 255 in the name of a folder


@dataclasses.dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    Attributes:
      index: its place in the sweep, from 0.
      name: its varying keys and values; also the name of its folder.
      overrides: dotted keys and values.
      config: the resolved config.
    """

    index: int
    name: str
    overrides: dict[str, Any]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file, read.

    Attributes:
      path: of the file.
      doc: its docstring.
      base: the config that every point changes.
      points: in the order of the file; none where the file has `suggest`.
      metrics: to compare; the first one decides. A leading minus sign marks those that should be small.
      suggest: for a search with Optuna, `trial -> overrides`; None if the file has none.
    """

    path: Path
    doc: str
    base: ConfigDict
    points: tuple[Point, ...]
    metrics: tuple[str, ...]
    suggest: Callable[[Any], Mapping[str, Any]] | None = None

    @property
    def title(self) -> str:
        """What to call it: the name of the file or, where that is sweep.py, of its folder."""
        return self.path.stem if self.path.stem != "sweep" else self.path.absolute().parent.name

    @property
    def deciding(self) -> tuple[str, bool]:
        """The metric that decides, and whether larger is better."""
        return self.metrics[0].removeprefix("-"), not self.metrics[0].startswith("-")


def load_sweep(path: str | Path) -> Sweep:
    """Reads a sweep file and expands it.

    Raises: ConfigError: the file or its base is not there, raises or lacks a part; it has both `sweep` and `suggest`;
      a point is no mapping of dotted keys, overrides a key of a section that the base does not have, or a key with a
      value of another type; two points are the same.
    """
    module = run_file(str(path), "the sweep")
    missing = [name for name in ("BASE", "metrics") if name not in module]
    if not {"sweep", "suggest"} & set(module):
        missing.append("sweep")
    if missing:
        raise ConfigError(
            f"{path} has no {' and no '.join(missing)}: a sweep file needs BASE, metrics(), and sweep() (or, for a "
            "search with Optuna, suggest(trial))."
        )
    if {"sweep", "suggest"} <= set(module):
        raise ConfigError(
            f"{path} has both sweep() and suggest(trial): keep sweep(), which lists the points, or suggest(trial), "
            "which lets Optuna choose them."
        )
    if wrong := [name for name in ("metrics", "sweep", "suggest") if not callable(module.get(name, callable))]:
        raise ConfigError(f"{path}: {wrong[0]} has to be a function, found {module[wrong[0]]!r}.")
    if not isinstance(module["BASE"], str):
        raise ConfigError(
            f'{path}: BASE has to be a config file, such as "configs/digits.py", found {module["BASE"]!r}.'
        )
    metrics = _result(path, module["metrics"])
    if not isinstance(metrics, list | tuple) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise ConfigError(
            f'{path}: metrics() has to return a list of at least one metric, such as ["test/top1"], found {metrics!r}.'
        )
    points = _result(path, module.get("sweep", tuple))
    if not isinstance(points, Iterable):
        raise ConfigError(f"{path}: sweep() has to yield the points, or to return a list of them, found {points!r}.")
    base = load_config(module["BASE"]).lock()
    return Sweep(
        path=Path(path),
        doc=(module["__doc__"] or "").strip(),
        base=base,
        points=expand(base, points, where=str(path)) if "sweep" in module else (),
        metrics=tuple(metrics),
        suggest=module.get("suggest"),
    )


def _result(path: str | Path, function: Callable[[], Any]) -> Any:
    """What a function of the sweep file returns; all that it yields, if it is a generator."""
    with naming_lines(str(path)):
        result = function()
        return list(result) if isinstance(result, Iterator) else result


def expand(base: ConfigDict, overrides: Iterable[Any], *, where: str) -> tuple[Point, ...]:
    """Applies each point's overrides to the base and names the points by what varies between them.

    Args:
      base: a locked config.
      overrides: dotted keys and values, one mapping for each point.
      where: for messages.

    Raises: ConfigError: see `load_sweep`.
    """
    all_overrides = list(overrides)
    if not all_overrides:
        raise ConfigError(f"{where}: the sweep has no points.")
    configs = [_override(base, point, f"{where}, point {i}") for i, point in enumerate(all_overrides)]
    names = [point_name(values) for values in varying(all_overrides, configs)]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in seen:
            raise ConfigError(f"{where}: points {seen[name]} and {i} are the same experiment ({name}).")
        seen[name] = i
    return tuple(Point(i, n, dict(o), c) for i, (n, o, c) in enumerate(zip(names, all_overrides, configs)))


def varying(overrides: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each point, the values of the overridden keys that not all points share; `DEFAULT` where it has none."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for point in overrides for key in point)
    several = [key for key in keys if len({repr(config.get(key, DEFAULT)) for config in flat}) > 1]
    return [{key: config.get(key, DEFAULT) for key in several} for config in flat]


def suggested(base: ConfigDict, overrides: Any, number: int, *, where: str) -> Point:
    """The point of one trial, named by what it has other than the base.

    Raises: ConfigError: see `load_sweep`.
    """
    config = _override(base, overrides, where)
    flat, before = flatten(config), flatten(base.to_dict())
    values = {key: flat[key] for key in overrides if key not in before or repr(flat[key]) != repr(before[key])}
    return Point(number, point_name(values) if values else "base", dict(overrides), config)


def _override(base: ConfigDict, overrides: Any, where: str) -> dict[str, Any]:
    """The base with the overrides in it. A key of one of its sections that it leaves at its default may be one of them;
    whether there is such a key is for `check` to say, which knows the signatures. A duration in another unit than the
    base's replaces the one of the base.
    """
    if not (isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides)):
        raise ConfigError(f'{where}: expected dotted keys and values, {{"optim.lr": 1e-3}}, found {overrides!r}.')
    config = ConfigDict(base.to_dict())
    known = flatten(base.to_dict())
    added = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key!r} is given a whole section; give its keys one by one, {key}.NAME.")
        if key in known:
            continue
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = section.get(part) if isinstance(section, ConfigDict) else None
        if not (sections and isinstance(section, ConfigDict)) or name in section:
            near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{where}: the base has no key {key!r}."
                + (f" Did you mean {near[0]!r}?" if near else "")
                + " A section that it leaves out has to be written into the file first."
            )
        added[key] = value
    config.lock()
    for key, value in overrides.items():
        if key not in added:
            try:
                config.update_from_flattened_dict({key: value})
            except TypeError as error:
                expected = f"a value such as {known[key]!r}, which the base has"
                raise ConfigError(f"{where}: {key}: expected {expected}, found {value!r}.") from error
    with config.unlocked():
        config.update_from_flattened_dict(added)
    return replace_durations(config.to_dict(), overrides)


def point_name(values: Mapping[str, Any]) -> str:
    """Keys (their last part where that is clear) and values, as a name for a folder.

    >>> point_name({"optim.lr": 1e-3, "run.seed": 1})
    'lr=0.001,seed=1'
    """
    last = [key.rpartition(".")[2] for key in values]
    keys = [short if last.count(short) == 1 else key for key, short in zip(values, last)]
    name = ",".join(f"{key}={_text(value)}" for key, value in zip(keys, values.values())) or "only"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "x".join(map(_text, value))
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)
