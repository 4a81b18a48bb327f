"""Runs a sweep: python -m vit_flax.sweep --sweep experiments/digits_lr_wd/sweep.py --workdir runs/lr_wd [--jobs 2].

Every point is checked before the first one starts. A sweep started again keeps what is done, lets half-finished
points go on and tries failed ones again. Exit codes: 0 all points are done · 2 wrong command line, a failed point or
an error with a message.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from vit_flax.config import ConfigError
from vit_flax.sweep import results, run
from vit_flax.sweep.points import Sweep, load_sweep


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="vit_flax.sweep", description="Runs a sweep, or goes on with it.")
    parser.add_argument("--sweep", required=True, help="the sweep file")
    parser.add_argument("--workdir", type=Path, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="points that run at once, each in a process of its own")
    parser.add_argument("--launcher", choices=run.LAUNCHERS, default="local")
    parser.add_argument(
        "--launcher_options", type=json.loads, default={}, help="JSON, such as '{\"gpus_per_node\": 1}'"
    )
    parser.add_argument("--point", type=int, help="runs that point alone, in this process (for any array scheduler)")
    parser.add_argument("--dry_run", action="store_true", help="checks and lists the points")
    arguments = parser.parse_args()
    try:
        return _run(load_sweep(arguments.sweep), arguments)
    except (ConfigError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(sweep: Sweep, arguments: argparse.Namespace) -> int:
    console = Console()
    check(sweep)
    if arguments.dry_run:
        for point in sweep.points:
            console.print(f"{point.index:4} {point.name}", markup=False, highlight=False, soft_wrap=True)
        return 0
    if arguments.workdir is None:
        raise ConfigError("--workdir is needed: a folder for the points and the results.")
    if arguments.point is not None:
        if not 0 <= arguments.point < len(sweep.points):
            raise ConfigError(f"--point={arguments.point}: the sweep has the points 0 to {len(sweep.points) - 1}.")
        return 0 if run.run_point(sweep, arguments.workdir, arguments.point)["status"] == "done" else 2
    run.claim(arguments.workdir, sweep)
    run.run(
        sweep,
        arguments.workdir.absolute(),
        jobs=arguments.jobs,
        launcher=arguments.launcher,
        launcher_options=arguments.launcher_options,
    )
    rows = results.collect(arguments.workdir, sweep)
    results.write_csv(arguments.workdir / "results.csv", rows)
    results.print_table(console, sweep, rows)
    return 0 if all(row.status == "done" for row in rows) else 2


def check(sweep: Sweep) -> None:
    """Builds every point, compiles nothing. Raises ConfigError: names the point and what is wrong with it."""
    from vit_flax.job import build

    for point in sweep.points:
        try:
            build(point.config)
        except ConfigError as error:
            raise ConfigError(f"{sweep.path}, point {point.index} ({point.name}): {error}") from error


if __name__ == "__main__":
    sys.exit(main())
