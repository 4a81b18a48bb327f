"""The launcher: python -m vit_flax.main --config configs/digits.py --workdir runs/digits [--config.optim.lr=...]."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a Python file with get_config(), or FILE:ARGUMENT.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "dry_run"],
    "train (or go on), evaluate the newest checkpoint, or print what would be trained.",
)

flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Runs one mode; what the user can put right ends with a message and exit code 2, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}. Options start with --config.")
    if _MODE.value != "dry_run" and not _WORKDIR.value:
        raise app.UsageError("--workdir is needed: a folder for checkpoints and metrics.")
    from vit_flax.config import ConfigError

    try:
        _run()
    except (ConfigError, FileNotFoundError, RuntimeError, OSError, FloatingPointError) as error:
        if os.environ.get("VIT_FLAX_TRACEBACK"):
            raise
        print(f"\nerror: {error}\n(VIT_FLAX_TRACEBACK=1 shows where.)", file=sys.stderr)
        sys.exit(2)


def _run() -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    from vit_flax import cache

    cache.enable_compilation_cache()
    if _MODE.value == "dry_run":
        from vit_flax.dry_run import dry_run

        dry_run(_CONFIG.value)
        return
    from vit_flax.trainer import evaluate, train

    run = {"train": train, "eval": evaluate}[_MODE.value]
    run(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
