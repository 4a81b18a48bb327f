"""A section of a config is the argument list of one callable, and the signature of that is the schema.

A key that the callable does not take, one that it needs and does not get, and a value of another type than its
annotation are `ConfigError`s that name the key, before anything expensive starts.
"""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vit_flax.config import ConfigError, flatten
from vit_flax.limits import outside


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
        if not _fits(value, expected):
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
