"""What Orbax and the libraries below it print beside the errors that they raise: hundreds of lines around our one."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quieten() -> None:
    """Leaves out tracebacks of reads and writes that failed; `vit_flax.checkpoint` reports all of these itself."""
    # Orbax's background threads log the error that `wait_until_finished` raises.
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "/orbax/" in record.pathname))
    # When one read fails, Orbax gives up the others, and each of them reports that.
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    report = sys.unraisablehook

    def without_closed_loops(event: Any) -> None:
        if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
            report(event)

    sys.unraisablehook = without_closed_loops
