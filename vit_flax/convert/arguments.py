"""What the commands share: types of arguments, with messages that say what was expected, and how printing ends."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from vit_flax.convert.resample import Grid


def size(text: str) -> Grid:
    """Rows and columns from "224" or "224x384"."""
    rows, _, columns = text.partition("x")
    try:
        return int(rows), int(columns or rows)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a size such as 224 or 224x384, found {text!r}") from error


def regex(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, found {text!r} ({error})") from error
    return text


def json_object(text: str) -> dict[str, Any]:
    """Names and values, as {"norm_eps": 1e-6}."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"""expected JSON such as {{"norm_eps": 1e-6}}, found {text!r}""")
    return values


def whole(least: int) -> Callable[[str], int]:
    """A whole number that is not below `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, found {text!r}")
        return number

    return read


def print_no_more() -> None:
    """For a BrokenPipeError: whoever reads what we print, such as `head`, has seen enough, and Python must not mind."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
