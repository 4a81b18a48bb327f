"""The launcher: python -m vit_flax.main --config configs/digits.py --workdir runs/digits [--config.optim.lr=1e-3].

Exit codes: 0 done · 1 wrong command line · 2 an error with a message · 75 stopped by a signal after saving (the same
command goes on from there).
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from vit_flax.command_line import given_config, parse_flags, stop
from vit_flax.config import ConfigError
from vit_flax.log_lines import show_warnings
from vit_flax.signals import exit_on_signals

# Keys that the file leaves at their defaults may be given as flags; `build` knows which keys there are.
config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment: a Python file with get_config(), or FILE:ARGUMENT.",
    lock_config=False,
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "dry_run"],
    "train (or go on), evaluate the newest checkpoint, or print what would be trained.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For a job of several processes: host:port of process 0, or auto, to find everything out from Slurm, Open MPI, a "
    "TPU pod slice or Kubernetes.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the job, with --coordinator host:port.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator host:port.")
_START_TIMEOUT = flags.DEFINE_integer("start_timeout_secs", 300, "For all processes to be there.", lower_bound=1)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_secs", 100, "A process that is silent for so long counts as dead.", lower_bound=1
)
_SHUTDOWN_TIMEOUT = flags.DEFINE_integer(
    "shutdown_timeout_secs", 300, "For the other processes to end too.", lower_bound=1
)
_VIRTUAL_DEVICES = flags.DEFINE_integer(
    "virtual_devices", None, "Runs on the CPU as if it were so many devices (per process).", lower_bound=1
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --mode dry_run: compiles for TPU chips that are not here, such as v5e:2x4 (needs libtpu)."
)


def main(argv: list[str]) -> None:
    """Runs one mode; an error that the user can fix ends with a message and exit code 2, without a traceback."""
    exit_on_signals()
    if len(argv) > 1:
        stop(
            f"unexpected argument {argv[1]!r}: options start with --config, --workdir or --mode, and the argument of a "
            "config follows a colon, --config FILE.py:ARGUMENT."
        )
    config = given_config()
    if config is None:
        stop("--config is needed, such as --config configs/digits.py.")
    if _MODE.value != "dry_run" and not _WORKDIR.value:
        stop("--workdir is needed: a folder for checkpoints and metrics.")
    if _TOPOLOGY.value and _MODE.value != "dry_run":
        stop("--topology is for --mode dry_run: its devices are not here.")
    show_warnings()
    from vit_flax import distributed

    with _without_waiting_for_failed_saves(), distributed.end_together():
        try:
            _run(config)
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            several = distributed.is_started() and not isinstance(error, ConfigError)
            if os.environ.get("VIT_FLAX_TRACEBACK") or several:
                raise
            stop(f"{error}\n(VIT_FLAX_TRACEBACK=1 shows where.)", code=2)


@contextlib.contextmanager
def _without_waiting_for_failed_saves() -> Iterator[None]:
    """A save that failed may leave threads of Orbax that wait ten minutes, and Python waits for them when it ends."""
    code: Any = None
    try:
        yield
    except SystemExit as end:
        code = end.code
    # By now all that could be written has been: what still waits, waits in vain.
    if any(not thread.daemon and type(thread).__module__.startswith("orbax.") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    if code is not None:
        sys.exit(code)


def _run(config: dict[str, Any]) -> None:
    """Sets JAX up, then starts the mode."""
    from vit_flax.gpu_flags import set_gpu_flags

    set_gpu_flags()
    import jax

    from vit_flax import distributed
    from vit_flax.cache import enable_compilation_cache
    from vit_flax.dry_run import dry_run
    from vit_flax.trainer import evaluate, train

    if _VIRTUAL_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _VIRTUAL_DEVICES.value)
    timeouts = distributed.Timeouts(_START_TIMEOUT.value, _HEARTBEAT_TIMEOUT.value, _SHUTDOWN_TIMEOUT.value)
    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeouts)
    enable_compilation_cache()
    if _MODE.value == "dry_run":
        dry_run(config, _TOPOLOGY.value)
    else:
        {"train": train, "eval": evaluate}[_MODE.value](config, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
