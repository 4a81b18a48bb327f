"""Parsing the flags of a command that takes a config, with a message instead of a traceback for what is wrong."""

import ast
import difflib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.tuple_parser import TupleParser

from vit_flax.config import ConfigError, flatten, load_config, plain, raised_in, replace_durations


def parse_flags(argv: list[str], code: int = 1) -> list[str]:
    """The parser of absl; what the command line or the config has wrong ends with a message and the exit code.

    None may be given for any key of the config, and any value for one that is None in the file.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, parser)
    try:
        rest = flags.FLAGS(argv)
        given_config()
    except Exception as error:  # a config file is a program, which may raise anything
        if os.environ.get("VIT_FLAX_TRACEBACK"):
            raise
        stop(_explain(argv, error), code)
    return rest


def given_config() -> dict[str, Any] | None:
    """The config of --config as nested dicts, with its overrides; None without that flag.

    A duration that the command line gives in another unit than the file replaces the one of the file.
    """
    flag: Any = flags.FLAGS["config"]
    if not flag.present:
        return None
    return replace_durations(plain(flag.value), config_flags.get_override_values(flag))


def stop(message: str, code: int = 1) -> NoReturn:
    """Ends the process with an error message and an exit code."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


class _Value(flags.ArgumentParser):
    """Reads a value of the config: None, or one of the type that the file has there.

    Args:
      parse: reads a text; takes a value of the type as it is. Raises ValueError or TypeError.
      expected: what it reads, in words.
    """

    def __init__(self, parse: Callable[[Any], Any], expected: str):
        self._parse, self._expected = parse, expected

    def parse(self, argument: Any) -> Any:
        if argument is None or argument == "None":
            return None
        try:
            return self._parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self._expected}, as in the file, or None") from None


def _literal(argument: str) -> Any:
    """A literal of Python, else the text itself: where the file does not tell the type."""
    try:
        return ast.literal_eval(argument.capitalize() if argument in ("true", "false") else argument)
    except (SyntaxError, ValueError):
        return argument


def _list(argument: Any) -> list[Any]:
    value = _literal(argument) if isinstance(argument, str) else argument
    if not isinstance(value, list | tuple):
        raise ValueError
    return list(value)


def _section(argument: Any) -> ConfigDict:
    value = _literal(argument) if isinstance(argument, str) else argument
    if not isinstance(value, dict | ConfigDict):
        raise ValueError
    return ConfigDict(plain(value))


_PARSERS = {
    bool: _Value(flags.BooleanParser().parse, "true or false"),
    int: _Value(flags.IntegerParser().parse, "a whole number"),
    float: _Value(flags.FloatParser().parse, "a number"),
    str: _Value(str, "a text"),
    tuple: _Value(TupleParser().parse, "values with commas between them"),
    list: _Value(_list, "a list, such as \"['a', 'b']\""),
    ConfigDict: _Value(_section, "a section, such as \"{'name': 'digits'}\""),
    type(None): _Value(_literal, "a value"),
}


def _explain(argv: list[str], error: Exception) -> str:
    """What is wrong with a config file, or with the overrides of it."""
    name = _config_name(argv)
    file = name.partition(":")[0]
    if not name and any(word.startswith(("--config.", "--config=")) for word in argv):
        return "--config FILE.py, or FILE.py:ARGUMENT, is needed before the keys that are changed."
    if name and not os.path.isfile(file):
        return f"there is no config file {file}: expected --config FILE.py, or FILE.py:ARGUMENT."
    if found := raised_in(file, error):
        return found
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"{error}\nA key of the config is changed by --config.SECTION.KEY=VALUE; --help lists the other flags."
    if isinstance(error, flags.Error):
        message, _, trace = str(error).partition("Traceback")  # of a get_config that was called with a wrong argument
        return "".join([message.strip(), *(f"\n{line}" for line in trace.strip().splitlines()[-1:])])
    try:
        known = flatten(plain(load_config(name)))
    except ConfigError as wrong:
        return str(wrong)
    for argument in argv[1:]:
        key = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            section = [name for name in known if name.startswith(key.partition(".")[0] + ".")]
            return (
                f"the config has no key {key!r}."
                + (f" Did you mean {near[0]}?" if near else "")
                + f"\nThere are: {', '.join(section or known)}."
                + "\nA section that the file leaves out is given whole, such as --config.sinks=\"{'csv': {}}\"."
            )
    return f"the config cannot be loaded: {error}"


def _config_name(argv: list[str]) -> str:
    """What follows --config; empty if nothing does."""
    words = iter(argv[1:])
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config"):
            return value if equals else next(words, "")
    return ""
