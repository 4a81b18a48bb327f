"""Parsing the flags of a command that takes a config, with a message instead of a traceback for what is wrong."""

import os
import sys
from typing import NoReturn

from absl import flags

from vit_flax.config import explain_overrides


def parse_flags(argv: list[str], code: int = 1) -> list[str]:
    """The parser of absl; what the command line or the config has wrong ends with a message and the exit code."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if os.environ.get("VIT_FLAX_TRACEBACK"):
            raise
        message, _, traceback = str(error).partition("Traceback")  # of a config file that raises
        stop("".join([message.strip(), *(f"\n{line}" for line in traceback.strip().splitlines()[-1:])]), code)
    except OSError as error:
        stop(f"the config cannot be loaded: {error}", code)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        stop(explain_overrides(argv, str(error)), code)


def stop(message: str, code: int = 1) -> NoReturn:
    """Ends the process with an error message and an exit code."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
