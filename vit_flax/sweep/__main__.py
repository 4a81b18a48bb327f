"""Runs a sweep: python -m vit_flax.sweep --sweep experiments/digits_lr_wd/sweep.py --workdir runs/lr_wd [--jobs 2].

Every point is checked before the first one starts. A sweep started again keeps what is done, lets half-finished
points go on and tries failed ones again. Exit codes: 0 all points are done · 2 wrong command line, a failed point or
an error with a message.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from vit_flax.config import ConfigError
from vit_flax.sweep import results, run
from vit_flax.sweep.page import write_page
from vit_flax.sweep.points import Sweep, load_sweep


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="vit_flax.sweep", description="Runs a sweep, or goes on with it.")
    parser.add_argument("--sweep", required=True, help="the sweep file")
    parser.add_argument("--workdir", type=Path, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="points that run at once, each in a process of its own")
    parser.add_argument("--vmap", action="store_true", help="trains points that differ in numbers only as one program")
    parser.add_argument("--max_members", type=int, help="of one such program; what fits in the memory of a GPU or TPU")
    parser.add_argument("--launcher", choices=run.LAUNCHERS, default="local")
    parser.add_argument(
        "--launcher_options", type=json.loads, default={}, help="JSON, such as '{\"gpus_per_node\": 1}'"
    )
    parser.add_argument("--point", type=int, help="runs that point alone, in this process (for any array scheduler)")
    parser.add_argument("--dry_run", action="store_true", help="checks and lists the points")
    arguments = parser.parse_args()
    if arguments.vmap:  # before JAX starts: members share the cores of a CPU as devices; no other backend reads this
        flag = f"--xla_force_host_platform_device_count={os.cpu_count()}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
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
    workdir = arguments.workdir.absolute()
    run.claim(workdir, sweep)
    if arguments.vmap:
        _run_members(sweep, workdir, arguments.max_members, console)
    else:
        options = dict(launcher=arguments.launcher, launcher_options=arguments.launcher_options)
        run.run(sweep, workdir, jobs=arguments.jobs, **options)
    rows = results.collect(workdir, sweep)
    results.write_csv(workdir / "results.csv", rows)
    results.print_table(console, sweep, rows)
    console.print(f"results  {workdir / 'results.csv'}\npage     {write_page(workdir, sweep, rows)}", soft_wrap=True)
    return 0 if all(row.status == "done" for row in rows) else 2


def _run_members(sweep: Sweep, workdir: Path, max_members: int | None, console: Console) -> None:
    from vit_flax.cache import enable_compilation_cache
    from vit_flax.sweep import members

    enable_compilation_cache()
    points = run.pending(workdir, sweep)
    if reason := members.explain_single(points):
        console.print(reason, soft_wrap=True)
    for group in members.group(points, max_members or (members.most_members(points[0]) if points else None)):
        console.print(f"{len(group)} members in one program: {group[0].name} to {group[-1].name}", soft_wrap=True)
        members.train_members(group, workdir, say=lambda line: console.print(line, highlight=False, soft_wrap=True))


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
