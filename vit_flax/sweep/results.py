"""What a sweep found: results.csv, a table on the console (best first), and the page sweep.html."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vit_flax.files import write_atomically
from vit_flax.sweep.points import Sweep, varying
from vit_flax.sweep.run import point_workdir, read_result

SEED = "run.seed"
MAX_ROWS = 30  # of the table on the console


@dataclass(frozen=True)
class Row:
    """A point and how it ended.

    Attributes:
      name: of the point.
      values: of the keys that vary in the sweep; lists as JSON.
      status: "done", "stopped" (by a search, before its end), "failed" or "pending".
      step: that it was trained to, where it is done or stopped.
      metrics: at that step.
      secs: wall time of training.
      error: of a point that failed.
    """

    name: str
    values: dict[str, Any]
    status: str
    step: int | None
    metrics: dict[str, float]
    secs: float | None
    error: str | None

    @property
    def has_metrics(self) -> bool:
        """Whether it ended well."""
        return self.status in ("done", "stopped")


def collect(workdir: Path, sweep: Sweep) -> list[Row]:
    """A row for each point, in the order of the sweep."""
    values = varying([point.overrides for point in sweep.points], [point.config for point in sweep.points])
    rows = []
    for point, own in zip(sweep.points, values):
        result = read_result(point_workdir(workdir, point)) or {"status": "pending"}
        rows.append(
            Row(
                name=point.name,
                values={k: json.dumps(v) if isinstance(v, list) else v for k, v in own.items()},
                status=result["status"],
                step=result.get("step"),
                metrics=result.get("metrics") or {},
                secs=result.get("secs"),
                error=result.get("error"),
            )
        )
    return rows


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each point; a cell that has no value is empty."""
    keys = list(rows[0].values)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", *keys, "status", "step", *metrics, "secs", "error"])
    for row in rows:
        numbers = [row.metrics.get(name, "") for name in metrics]
        writer.writerow(
            [row.name, *row.values.values(), row.status, row.step or "", *numbers, row.secs or "", row.error or ""]
        )
    write_atomically(path, out.getvalue())


@dataclass(frozen=True)
class Setting:
    """Points that differ in the seed only: mean and standard deviation of each metric over those that ended well.

    A search may stop some of them before the others; then they are several settings, each with its `stopped_after`.
    """

    values: dict[str, Any]
    stopped_after: int | None
    rows: tuple[Row, ...]
    mean: dict[str, float]
    std: dict[str, float]


def settings(rows: Sequence[Row], metric: str, larger_is_better: bool) -> list[Setting]:
    """The rows grouped over seeds: those that trained to the end, then those that got less far, each best first.

    Settings without a finite mean come last among their like.
    """
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        values = repr({k: v for k, v in row.values.items() if k != SEED})
        groups.setdefault((values, row.step if row.status == "stopped" else None), []).append(row)
    found = []
    for (_, stopped_after), group in groups.items():
        done = [row for row in group if row.has_metrics]
        names = list(dict.fromkeys(name for row in done for name in row.metrics))
        numbers = {name: [row.metrics.get(name, math.nan) for row in done] for name in names}
        found.append(
            Setting(
                values={k: v for k, v in group[0].values.items() if k != SEED},
                stopped_after=stopped_after,
                rows=tuple(group),
                mean={name: _finite(statistics.fmean, values) for name, values in numbers.items()},
                std={n: _finite(statistics.stdev, values) if len(values) > 1 else 0.0 for n, values in numbers.items()},
            )
        )

    def worth(setting: Setting) -> tuple[float, float]:
        reached = math.inf if setting.stopped_after is None else float(setting.stopped_after)
        value = setting.mean.get(metric, math.nan)
        if not setting.mean:  # nothing there: failed or pending
            return -math.inf, -math.inf
        return reached, -math.inf if not math.isfinite(value) else value if larger_is_better else -value

    return sorted(found, key=worth, reverse=True)


def _finite(statistic: Callable[[Sequence[float]], float], values: Sequence[float]) -> float:
    """NaN where a value is not finite, which `statistics` answers with errors of all kinds."""
    return statistic(values) if all(map(math.isfinite, values)) else math.nan


def print_table(console: Console, sweep: Sweep, rows: Sequence[Row]) -> None:
    """The settings, best first, and what failed."""
    metric, larger = sweep.deciding
    names = [name.removeprefix("-") for name in sweep.metrics]
    ranked = settings(rows, metric, larger)
    keys = list(ranked[0].values)
    table = Table(title=f"{sweep.path}: best {metric} first", title_justify="left")
    for key in keys:
        table.add_column(key)
    table.add_column("seeds", justify="right")
    stops = any(setting.stopped_after for setting in ranked)
    if stops:
        table.add_column("stopped after", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for setting in ranked[:MAX_ROWS]:
        done = [row for row in setting.rows if row.has_metrics]
        cells = [mean_and_std(setting, name, len(done)) for name in names]
        seeds = f"{len(done)}/{len(setting.rows)}" if len(done) < len(setting.rows) else str(len(done))
        where = [stop_of(setting)] if stops else []
        table.add_row(*(_plain(setting.values[key]) for key in keys), seeds, *where, *cells)
    console.print(table)
    if len(ranked) > MAX_ROWS:
        console.print(f"and {len(ranked) - MAX_ROWS} more in results.csv")
    for row in rows:
        if row.status == "failed":
            console.print(f"FAILED {row.name}: {row.error}", markup=False, highlight=False, soft_wrap=True)


def stop_of(setting: Setting) -> str:
    """Where a search stopped a setting: such as "step 66", "the end", or a dash for what failed."""
    if setting.stopped_after is not None:
        return f"step {setting.stopped_after}"
    return "the end" if setting.mean else "-"


def mean_and_std(setting: Setting, metric: str, count: int) -> str:
    """Such as "0.9781 ± 0.0012"; without the second part for one seed, a dash for none."""
    if metric not in setting.mean:
        return "-"
    mean = f"{setting.mean[metric]:.4f}"
    return mean if count < 2 else f"{mean} ± {setting.std[metric]:.4f}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def main_effects(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """How much of the metric's variance each key explains by itself: variance of the means of its values / total.

    Empty for a search that stopped points early: what is left is a choice of the metric itself. Numbers that are drawn,
    with so many values that there are less than three points to each, are cut into quarters; a key that has less
    than two points to a value even then says nothing, and is left out.

    Source: first-order Sobol indices, estimated on the points of the sweep (Saltelli et al. 2008, section 1.2.10);
    exact for a full grid of few values.
    """
    done = [row for row in rows if row.status == "done" and math.isfinite(row.metrics.get(metric, math.nan))]
    if any(row.status == "stopped" for row in rows):
        return {}
    if len(done) < 2 or not (total := statistics.pvariance([row.metrics[metric] for row in done])):
        return {}
    effects: dict[str, float] = {}
    for key in done[0].values:
        groups: dict[Any, list[float]] = {}
        for row, level in zip(done, _levels([row.values[key] for row in done])):
            groups.setdefault(level, []).append(row.metrics[metric])
        if 2 * len(groups) > len(done):
            continue
        means = [(statistics.fmean(values), len(values)) for values in groups.values()]
        centre = statistics.fmean([row.metrics[metric] for row in done])
        effects[key] = sum(n * (mean - centre) ** 2 for mean, n in means) / len(done) / total
    return dict(sorted(effects.items(), key=lambda item: -item[1]))


def _levels(values: Sequence[Any]) -> list[Any]:
    numbers = sorted({v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
    if len(numbers) <= 4 or 3 * len({repr(v) for v in values}) <= len(values):
        return [repr(value) for value in values]
    quarters = {v: 4 * i // len(numbers) for i, v in enumerate(numbers)}
    return [quarters.get(v, repr(v)) if not isinstance(v, (bool, list)) else repr(v) for v in values]
