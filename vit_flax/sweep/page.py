"""`sweep.html`: what a sweep found, in one file that needs no network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vit_flax.files import write_atomically
from vit_flax.report import page, whole_lines
from vit_flax.report.charts import Series, line_chart, number
from vit_flax.sweep.points import Sweep, point_name
from vit_flax.sweep.results import SEED, Row, Setting, main_effects, mean_and_std, settings, stop_of

MARKS = 9  # values written beside an axis
CURVES = 6  # settings whose curves are drawn: as many as there are colours


def write_page(workdir: Path, sweep: Sweep, rows: Sequence[Row]) -> Path:
    """Writes `sweep.html` into the folder of the sweep, finished or not, and returns its path."""
    metric, larger = sweep.deciding
    ranked = settings(rows, metric, larger)
    done, stopped = (sum(row.status == status for row in rows) for status in ("done", "stopped"))
    count = f"{done} of {len(rows)} points" + (f" to the end, {stopped} stopped before" if stopped else "")
    body = [
        f"<header><p class=kicker>Sweep · {count}</p><h1>{escape(sweep.title)}</h1>"
        f"<p>{escape(sweep.doc.splitlines()[0] if sweep.doc else '')}</p></header>",
        _table(sweep, ranked),
        _curves(workdir, ranked, metric),
        _heat_map(ranked, metric, larger),
        _effects(main_effects(rows, metric), metric),
        _parallel(rows, metric),
        _failures(rows),
        f"<section><h2>Question</h2><pre>{escape(sweep.doc)}</pre></section>" if sweep.doc else "",
    ]
    path = workdir / "sweep.html"
    write_atomically(path, page(f"{sweep.title}: vit_flax sweep", "\n".join(body)))
    return path


def _table(sweep: Sweep, ranked: Sequence[Setting]) -> str:
    names = [name.removeprefix("-") for name in sweep.metrics]
    keys = list(ranked[0].values)
    stops = ["stopped after"] if any(setting.stopped_after for setting in ranked) else []
    head = "".join(f"<th>{escape(name)}</th>" for name in (*keys, "seeds", *stops, *names))
    lines = []
    for setting in ranked:
        count = sum(row.has_metrics for row in setting.rows)
        cells = [*(_plain(v) for v in setting.values.values()), str(count), *(stop_of(setting) for _ in stops)]
        cells += [mean_and_std(setting, name, count) for name in names]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        f"<section><h2>Best first, by {escape(sweep.deciding[0])}</h2><div class=scroll><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _curves(workdir: Path, ranked: Sequence[Setting], metric: str) -> str:
    """The metric and the training loss of the best settings (of their first seeds) over the steps."""
    charts = []
    for name in (metric, "train/loss"):
        series = []
        for i, setting in enumerate(ranked[:CURVES]):
            file = workdir / "points" / setting.rows[0].name / "metrics.jsonl"
            lines = whole_lines(file) if file.exists() else []
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = point_name({key: _plain(value) for key, value in setting.values.items()})
            series.append(Series(label.replace(",", ", "), points, f"c{i}"))
        charts.append(line_chart(name, [s for s in series if s.points]))
    if not any(charts):
        return ""
    seeds = any(len(setting.rows) > 1 for setting in ranked[:CURVES])
    note = "<p class=note>The first seed of each.</p>" if seeds else ""
    title = f"<h2>The best {min(len(ranked), CURVES)}</h2>{note}"
    return f"<section>{title}<div class=charts>{''.join(charts)}</div></section>"


def _heat_map(ranked: Sequence[Setting], metric: str, larger: bool) -> str:
    """Rows and columns of a sweep over two keys."""
    keys = list(ranked[0].values)
    if len(keys) != 2:
        return ""
    down, across = (_in_order(s.values[key] for s in ranked) for key in keys)
    cells = {(s.values[keys[0]], s.values[keys[1]]): s.mean.get(metric, math.nan) for s in ranked}
    finite = [value for value in cells.values() if math.isfinite(value)]
    if not finite or 2 * len(cells) < len(down) * len(across):  # no grid: points that were drawn
        return ""
    low, high = min(finite), max(finite)

    def cell(value: float) -> str:
        if not math.isfinite(value):
            return "<td></td>"
        part = (value - low) / (high - low) if high > low else 1.0
        part = part if larger else 1 - part
        strong = " strong" if part > 0.6 else ""
        return f'<td class="right{strong}" style="--part:{100 * part:.0f}%;width:70px">{number(value)}</td>'

    lines = [
        f"<tr><th>{escape(_plain(a))}</th>{''.join(cell(cells.get((a, b), math.nan)) for b in across)}</tr>"
        for a in down
    ]
    head = "".join(f"<th>{escape(_plain(b))}</th>" for b in across)
    return (
        f"<section><h2>{escape(metric)}: {escape(keys[0])} down, {escape(keys[1])} across</h2><div class=scroll>"
        f"<table class=confusion><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "</div></section>"
    )


def _effects(effects: Mapping[str, float], metric: str) -> str:
    if not effects:
        return ""
    lines = [
        f'<tr><th>{escape(key)}</th><td class=bar style="--part:{100 * part:.0f}%">{100 * part:.0f} %</td></tr>'
        for key, part in effects.items()
    ]
    return (
        f"<section><h2>What decides {escape(metric)}</h2><p class=note>Part of the variance that each key explains by "
        f"itself (cut into quarters where values were drawn); the rest is interaction and chance.</p>"
        f"<table>{''.join(lines)}</table></section>"
    )


def _parallel(rows: Sequence[Row], metric: str) -> str:
    """A line per point through an axis per key and one for the metric: parallel coordinates."""
    done = [row for row in rows if row.status == "done" and math.isfinite(row.metrics.get(metric, math.nan))]
    if len(done) < 2:
        return ""
    axes = {key: [row.values[key] for row in done] for key in done[0].values if key != SEED}
    axes[metric] = [row.metrics[metric] for row in done]
    width, height, top, bottom, side = 900, 300, 34, 24, 70
    gap = (width - 2 * side) / max(len(axes) - 1, 1)
    low, high = min(axes[metric]), max(axes[metric])
    marks, heights = [], []
    for i, (key, values) in enumerate(axes.items()):
        levels = _in_order(values)
        x = side + i * gap
        if key == metric:
            place = {v: (v - low) / (high - low) if high > low else 0.5 for v in levels}
            shown = [low, high]
        else:
            place = {v: n / (len(levels) - 1) if len(levels) > 1 else 0.5 for n, v in enumerate(levels)}
            count = min(len(levels), MARKS)
            shown = [levels[round(n * (len(levels) - 1) / max(count - 1, 1))] for n in range(count)]
        heights.append([height - bottom - place[v] * (height - top - bottom) for v in values])
        marks.append(f'<line class="grid" x1="{x:.0f}" x2="{x:.0f}" y1="{top}" y2="{height - bottom}"/>')
        marks.append(f'<text class="tick" x="{x:.0f}" y="16" text-anchor="middle">{escape(key)}</text>')
        for v in shown:
            y = height - bottom - place[v] * (height - top - bottom)
            outside = f'x="{x - 6:.0f}" text-anchor="end"' if i == 0 else f'x="{x + 6:.0f}"'
            marks.append(f'<text class="tick halo" {outside} y="{y + 4:.0f}">{escape(_plain(v))}</text>')
    lines = []
    for n, _ in enumerate(done):
        deep = round(9 * (axes[metric][n] - low) / (high - low)) if high > low else 5
        path = "L".join(f"{side + i * gap:.0f} {ys[n]:.0f}" for i, ys in enumerate(heights))
        lines.append(f'<g class="d{deep}"><path d="M{path}"/></g>')
    return (
        f'<section><h2>Every point</h2><figure class="chart"><figcaption>From its values to {escape(metric)}; darker '
        f'is higher</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="parallel coordinates">'
        f"{''.join(lines)}{''.join(marks)}</svg></figure></section>"
    )


def _failures(rows: Sequence[Row]) -> str:
    failed = [f"<li>{escape(row.name)}: {escape(row.error or '')}</li>" for row in rows if row.status == "failed"]
    return f"<section><h2>Failed</h2><ul class=plain>{''.join(failed)}</ul></section>" if failed else ""


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Each once: numbers by their size, then all else by its kind."""
    is_number = {v: isinstance(v, int | float) for v in values}
    return sorted(is_number, key=lambda v: ("" if is_number[v] else str(type(v)), v))


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
