"""Runs a sweep: python -m vit_flax.sweep --sweep experiments/digits_lr_wd/sweep.py --workdir runs/lr_wd [--jobs 2].

Every point is checked before the first one starts. A sweep started again keeps what is done, lets half-finished
points go on and tries failed ones again. A search trains only the best points to their end (`--search halving`), or
lets Optuna choose the points (a sweep file with `suggest`, and `--trials`). Exit codes: 0 all points are done, or the
search is, whatever became of single points · 2 wrong command line, a failed point or an error with a message · 75
stopped by a signal after saving (the same command goes on from there).
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from vit_flax.config import ConfigError
from vit_flax.console import RunConsole
from vit_flax.gpu_flags import set_gpu_flags
from vit_flax.signals import exit_on_signals
from vit_flax.sweep import results, run
from vit_flax.sweep.check import check, check_apart
from vit_flax.sweep.halving import Halving, rungs_of
from vit_flax.sweep.page import write_page
from vit_flax.sweep.points import Sweep, load_sweep
from vit_flax.sweep.trials import Trials


def main() -> int:
    """Returns the exit code."""
    exit_on_signals()
    set_gpu_flags()
    arguments = _parser().parse_args()
    if arguments.vmap:  # before JAX starts: members share the cores of a CPU as devices; no other backend reads this
        flag = f"--xla_force_host_platform_device_count={os.cpu_count()}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    try:
        sweep = load_sweep(arguments.sweep)
        _check_arguments(sweep, arguments)
        return _run(sweep, arguments)
    except (ValueError, ModuleNotFoundError, OSError, RuntimeError) as error:
        if os.environ.get("VIT_FLAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vit_flax.sweep", description="Runs a sweep, or goes on with it.")
    parser.add_argument("--sweep", required=True, help="the sweep file")
    parser.add_argument("--workdir", type=lambda text: Path(text).expanduser(), help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="points that run at once, each in a process of its own")
    parser.add_argument("--vmap", action="store_true", help="trains points that differ in numbers only as one program")
    parser.add_argument("--max_members", type=int, help="of one such program; what fits in the memory of a GPU or TPU")
    parser.add_argument("--launcher", choices=run.LAUNCHERS, default="local")
    parser.add_argument("--launcher_options", type=_options, default={}, help="JSON, such as '{\"gpus_per_node\": 1}'")
    parser.add_argument("--point", type=int, help="runs that point alone, in this process (for any array scheduler)")
    parser.add_argument("--dry_run", action="store_true", help="checks and lists the points")
    search = parser.add_argument_group("searches")
    search.add_argument("--search", choices=["halving"], help="halving: only the best points train to their end")
    search.add_argument("--halving_factor", type=int, default=3, help="one of so many points goes on; default 3")
    search.add_argument("--min_steps", type=int, help="no comparison before; default: the steps of a point / factor²")
    search.add_argument("--trials", type=int, help="of a sweep file with suggest(trial), in all")
    search.add_argument("--search_seed", type=int, default=0, help="of Optuna's sampler")
    return parser


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, such as '{{\"gpus_per_node\": 1}}', found {text!r}.")
    return options


def _check_arguments(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """Raises ConfigError: flags that do not go together, or not with the sweep file."""
    for name, least in (("jobs", 1), ("max_members", 1), ("halving_factor", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value}: expected {least} or more.")
    if arguments.workdir is None and not arguments.dry_run:
        raise ConfigError("--workdir is needed: a folder for the points and the results.")
    if arguments.vmap and (arguments.jobs > 1 or arguments.launcher != "local" or arguments.point is not None):
        raise ConfigError("--vmap trains points in this one process: not with --jobs, --launcher or --point.")
    if arguments.max_members is not None and not arguments.vmap:
        raise ConfigError("--max_members is for --vmap: other points train one in a process.")
    if arguments.min_steps is not None and not arguments.search:
        raise ConfigError("--min_steps is for --search halving: other points train to their end.")
    if sweep.suggest is None and arguments.trials is not None:
        raise ConfigError(
            f"--trials is for a search with Optuna, and {sweep.path} has sweep() in place of suggest(trial)."
        )
    if sweep.suggest is not None and arguments.trials is None:
        raise ConfigError(f"{sweep.path} has suggest(trial), a search with Optuna: give the number of --trials.")
    if sweep.suggest is not None and arguments.search:
        raise ConfigError(
            f"--search={arguments.search} needs points, and {sweep.path} has suggest(trial), not sweep()."
        )
    search = arguments.search or ("suggest(trial)" if sweep.suggest else None)
    if search and (arguments.vmap or arguments.point is not None):
        raise ConfigError(f"{search} decides after each point what runs next: not with --vmap or --point.")
    if arguments.point is not None and not 0 <= arguments.point < len(sweep.points):
        raise ConfigError(f"--point={arguments.point}: the sweep has the points 0 to {len(sweep.points) - 1}.")


def _run(sweep: Sweep, arguments: argparse.Namespace) -> int:
    console = RunConsole()
    trials = Trials(sweep, None, count=arguments.trials, seed=arguments.search_seed) if sweep.suggest else None
    if trials is not None:  # a trial that is not kept: what is wrong with suggest(trial) shows before the first starts
        trials.next()
    here = arguments.vmap or arguments.point is not None or arguments.dry_run
    lengths = (check if here else check_apart)(sweep.path, trials.points if trials else sweep.points, sweep.metrics)
    rungs = rungs_of(lengths, arguments.halving_factor, arguments.min_steps) if arguments.search else None
    if arguments.dry_run:
        _list(sweep, rungs, trials, console)
        return 0
    if arguments.point is not None:
        point = sweep.points[arguments.point]
        result = run.read_result(run.point_workdir(arguments.workdir, point))
        if result is None or result["status"] != "done":
            result = run.run_point(point, arguments.workdir)
        return 0 if result["status"] == "done" else 2
    from vit_flax import workdir as folders  # imports JAX: not for --help

    workdir = arguments.workdir.absolute()
    with folders.lock(workdir):
        return _run_here(sweep, workdir, rungs, arguments, console)


def _list(sweep: Sweep, rungs: list[int] | None, trials: Trials | None, console: Console) -> None:
    for point in trials.points if trials else sweep.points:
        console.print(f"{point.index:4} {point.name}", markup=False, highlight=False, soft_wrap=True)
    if trials:
        console.print("     the first trial; what comes later depends on the results")
    if rungs:
        console.print(f"compared after {', '.join(map(str, rungs[:-1]))} of {rungs[-1]} steps", highlight=False)


def _run_here(
    sweep: Sweep, workdir: Path, rungs: list[int] | None, arguments: argparse.Namespace, console: Console
) -> int:
    """Runs the sweep in a workdir that nobody else uses, and writes down what it found."""
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    plan = _plan(sweep, workdir, rungs, arguments)
    there = {path.name for path in (workdir / "points").glob("*")}
    if others := sorted(there - {point.name for point in plan.points}):
        say(
            f"{len(others)} of the folders in {workdir / 'points'} are of no point of this file (any more), such as "
            f"{others[0]}. They are left as they are."
        )
    if arguments.vmap:
        _run_members(sweep, workdir, arguments.max_members, say)
    else:
        options = dict(launcher=arguments.launcher, launcher_options=arguments.launcher_options)
        run.run(plan, workdir, jobs=arguments.jobs, **options, say=say)
    sweep = dataclasses.replace(sweep, points=plan.points)
    rows = results.collect(workdir, sweep)
    results.write_csv(workdir / "results.csv", rows)
    results.print_table(console, sweep, rows)
    console.print(f"results  {workdir / 'results.csv'}\npage     {write_page(workdir, sweep, rows)}", soft_wrap=True)
    return 0 if plan.finished else 2


def _plan(sweep: Sweep, workdir: Path, rungs: list[int] | None, arguments: argparse.Namespace) -> run.Plan:
    """What decides which point runs next. Raises ConfigError: the workdir holds another sweep or search."""
    if sweep.suggest:
        run.claim(workdir, sweep, {"sampler": "TPE", "seed": arguments.search_seed, "metric": sweep.metrics[0]})
        return Trials(sweep, workdir, count=arguments.trials, seed=arguments.search_seed)
    if rungs:
        run.claim(workdir, sweep, {"rungs": rungs, "factor": arguments.halving_factor, "metric": sweep.metrics[0]})
        rules = dict(factor=arguments.halving_factor, deciding=sweep.deciding, asynchronous=arguments.jobs > 1)
        return Halving(sweep.points, workdir, rungs=rungs, **rules)
    run.claim(workdir, sweep)
    return run.Each(sweep.points, workdir)


def _run_members(sweep: Sweep, workdir: Path, max_members: int | None, say: Callable[[str], None]) -> None:
    from vit_flax.cache import enable_compilation_cache
    from vit_flax.sweep import members

    enable_compilation_cache()
    points = run.pending(workdir, sweep)
    if reason := members.explain_single(points):
        say(reason)
    for group in members.group(points, max_members or (members.most_members(points[0]) if points else None)):
        say(f"{len(group)} members in one program: {group[0].name} to {group[-1].name}")
        members.train_members(group, workdir, say=say)


if __name__ == "__main__":
    sys.exit(main())
