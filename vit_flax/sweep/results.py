"""What a sweep found: results.csv, a table on the console (best first), and the page sweep.html."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vit_flax.config import flatten
from vit_flax.files import write_atomically
from vit_flax.sweep.points import Sweep, point_name
from vit_flax.sweep.run import point_workdir, read_result

SEED = "run.seed"


@dataclass(frozen=True)
class Row:
    """A point and how it ended.

    Attributes:
      name: of the point.
      values: of the keys that vary in the sweep.
      status: "done", "failed" or "pending".
      metrics: of a point that is done (or of the last rung of a search).
      secs: wall time of training.
      error: of a point that failed.
    """

    name: str
    values: dict[str, Any]
    status: str
    metrics: dict[str, float]
    secs: float | None
    error: str | None


def collect(workdir: Path, sweep: Sweep) -> list[Row]:
    """A row for each point, in the order of the sweep."""
    flat = [flatten(point.config) for point in sweep.points]
    varying = [
        k for k in dict.fromkeys(k for p in sweep.points for k in p.overrides) if len({repr(f[k]) for f in flat}) > 1
    ]
    rows = []
    for point, config in zip(sweep.points, flat):
        result = read_result(point_workdir(workdir, point)) or {"status": "pending"}
        rows.append(
            Row(
                name=point.name,
                values={key: config[key] for key in varying},
                status=result["status"],
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
    writer.writerow(["name", *keys, "status", *metrics, "secs", "error"])
    for row in rows:
        numbers = [row.metrics.get(name, "") for name in metrics]
        values = [json.dumps(v) if isinstance(v, list) else v for v in row.values.values()]
        writer.writerow([row.name, *values, row.status, *numbers, row.secs or "", row.error or ""])
    write_atomically(path, out.getvalue())


@dataclass(frozen=True)
class Setting:
    """Points that differ in the seed only: mean and standard deviation of each metric over those that are done."""

    values: dict[str, Any]
    rows: tuple[Row, ...]
    mean: dict[str, float]
    std: dict[str, float]

    @property
    def name(self) -> str:
        """As a point is named, without the seed."""
        return point_name(self.values)


def settings(rows: Sequence[Row], metric: str, larger_is_better: bool) -> list[Setting]:
    """The rows grouped over seeds, best first; settings without a finite mean come last."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr({k: v for k, v in row.values.items() if k != SEED}), []).append(row)
    found = []
    for group in groups.values():
        done = [row for row in group if row.status == "done"]
        names = list(dict.fromkeys(name for row in done for name in row.metrics))
        numbers = {name: [row.metrics.get(name, math.nan) for row in done] for name in names}
        found.append(
            Setting(
                values={k: v for k, v in group[0].values.items() if k != SEED},
                rows=tuple(group),
                mean={name: statistics.fmean(values) for name, values in numbers.items()},
                std={n: statistics.stdev(values) if len(values) > 1 else 0.0 for n, values in numbers.items()},
            )
        )

    def worth(setting: Setting) -> float:
        value = setting.mean.get(metric, math.nan)
        return -math.inf if not math.isfinite(value) else value if larger_is_better else -value

    return sorted(found, key=worth, reverse=True)


def print_table(console: Console, sweep: Sweep, rows: Sequence[Row], limit: int = 30) -> None:
    """The settings, best first, and what failed."""
    metric, larger = sweep.deciding
    names = [name.removeprefix("-") for name in sweep.metrics]
    ranked = settings(rows, metric, larger)
    keys = list(ranked[0].values)
    table = Table(title=f"{sweep.path}: best {metric} first", title_justify="left")
    for key in keys:
        table.add_column(key)
    table.add_column("seeds", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for setting in ranked[:limit]:
        done = [row for row in setting.rows if row.status == "done"]
        cells = [mean_and_std(setting, name, len(done)) for name in names]
        seeds = f"{len(done)}/{len(setting.rows)}" if len(done) < len(setting.rows) else str(len(done))
        table.add_row(*(_plain(setting.values[key]) for key in keys), seeds, *cells)
    console.print(table)
    if len(ranked) > limit:
        console.print(f"and {len(ranked) - limit} more in results.csv")
    for row in rows:
        if row.status == "failed":
            console.print(f"FAILED {row.name}: {row.error}", markup=False, highlight=False, soft_wrap=True)


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

    Source: first-order Sobol indices, estimated on the points of the sweep (Saltelli et al. 2008, section 1.2.10);
    exact for a full grid.
    """
    done = [row for row in rows if row.status == "done" and math.isfinite(row.metrics.get(metric, math.nan))]
    if len(done) < 2 or not (total := statistics.pvariance([row.metrics[metric] for row in done])):
        return {}
    effects: dict[str, float] = {}
    for key in done[0].values:
        groups: dict[str, list[float]] = {}
        for row in done:
            groups.setdefault(repr(row.values[key]), []).append(row.metrics[metric])
        means = [(statistics.fmean(values), len(values)) for values in groups.values()]
        centre = statistics.fmean([row.metrics[metric] for row in done])
        effects[key] = sum(n * (mean - centre) ** 2 for mean, n in means) / len(done) / total
    return dict(sorted(effects.items(), key=lambda item: -item[1]))
