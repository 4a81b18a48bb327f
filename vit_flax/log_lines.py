"""What commands show of the log: warnings and errors, ours and those of libraries, as plain lines."""

import logging
import sys


def show_warnings() -> None:
    """Prints "warning: ..." on what `sys.stderr` is at that moment: where a progress bar is, above it."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file at INFO
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [_Lines()]


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr, flush=True)
