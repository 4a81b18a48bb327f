"""The console of a run, which may lose its reader."""

import contextlib

from rich.console import Console


class RunConsole(Console):
    """As rich's, but where the reader of the output is gone (Ctrl-C ends `| tee`, too) the run goes on in silence.

    Rich ends the process there, whatever is not saved yet.
    """

    def on_broken_pipe(self) -> None:
        """Says nothing more."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()
