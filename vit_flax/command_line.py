"""Parsing the flags of a command that takes a config, with a message instead of a traceback for what is wrong."""

import ast
import difflib
import os
import sys
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.tuple_parser import TupleParser

from vit_flax.config import ConfigError, flatten, load_config, plain, raised_in, replace_durations


def parse_flags(argv: list[str], code: int = 1) -> list[str]:
    """The parser of absl; what the command line or the config has wrong ends with a message and the exit code.

    None may be given for any key of the config, and any value for one that is None in the file.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
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
    flag = flags.FLAGS["config"]
    if not flag.present:
        return None
    return replace_durations(plain(flag.value), config_flags.get_override_values(flag))


def stop(message: str, code: int = 1) -> NoReturn:
    """Ends the process with an error message and an exit code."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


class _Literal(flags.ArgumentParser):
    """Of a key whose type the file does not tell: a Python literal, else a text."""

    def parse(self, argument: Any) -> Any:
        try:
            return ast.literal_eval(argument.capitalize() if argument in ("true", "false") else argument)
        except (SyntaxError, ValueError):
            return argument


class _OrNone(flags.ArgumentParser):
    """What a parser takes, and None."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument in ("None", None) else self._parser.parse(argument)


_PARSERS = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
    tuple: TupleParser(),
    list: _Literal(),
    type(None): _Literal(),
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
