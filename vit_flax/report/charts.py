"""Line charts as inline SVG: no library, no script, colours from the page's style."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 400
FEW_POINTS = 40  # so few are marked one by one


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
      name: for the legend.
      points: (step, value) in the order of the steps; a value of None is a gap.
      style: class of the page's style, such as "c0".
    """

    name: str
    points: Sequence[tuple[int, float | None]]
    style: str


def line_chart(title: str, series: Sequence[Series], *, log: bool = False, note: str = "") -> str:
    """A figure with one chart and a legend of the last values; empty text where no series has a value.

    Args:
      title: of the figure.
      series: the curves.
      log: whether the vertical axis is logarithmic; values that are not positive are left out then.
      note: a line below the title.
    """
    series = [Series(s.name, _thinned(s.points, log), s.style) for s in series]
    series = [s for s in series if any(value is not None for _, value in s.points)]
    if not series:
        return ""
    values = [value for s in series for _, value in s.points if value is not None]
    last_step = max(step for s in series for step, _ in s.points)
    y_ticks = _log_ticks(min(values), max(values)) if log else _ticks(min(values), max(values))
    scale = math.log10 if log else float
    low, high = scale(y_ticks[0]), scale(y_ticks[-1])

    def x(step: float | int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last_step, 1)

    def y(value: float | int) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(value) - low) / (high - low)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    x_ticks = [tick for tick in _ticks(0, last_step, 4) if tick <= last_step]
    for tick in x_ticks:
        anchor = "end" if x(tick) > WIDTH - 24 else "middle"
        label = number(tick) if tick else "step 0"
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{label}</text>')
    parts += [_curve(s, x, y) for s in series]
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    legend = "".join(_legend_entry(s) for s in series)
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    frame = json.dumps({"left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "last_step": max(last_step, 1)})
    return (
        f'<figure class="chart" data-frame="{html.escape(frame)}"><figcaption>{html.escape(title)}</figcaption>{note}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} over the steps">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}<li class="step"></li></ul></figure>'
    )


def number(value: float | int) -> str:
    """A number for people: "0.986", "12k", "3e-4"."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e9 or size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, suffix in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if suffix == 'M' else 1e3):.3g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 1 else f"{float(f'{value:.4f}'):g}"


def _curve(series: Series, x, y) -> str:
    path, pen_up = [], True
    for step, value in series.points:
        if value is None:
            pen_up = True
            continue
        path.append(f"{'M' if pen_up else 'L'}{x(step):.1f} {y(value):.1f}")
        pen_up = False
    dots = ""
    if len(series.points) <= FEW_POINTS:
        there = [(step, value) for step, value in series.points if value is not None]
        dots = "".join(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.2"/>' for step, value in there)
    return f'<g class="{series.style}"><path d="{"".join(path)}"/>{dots}</g>'


def _legend_entry(series: Series) -> str:
    points = [(step, value) for step, value in series.points if value is not None]
    data = json.dumps([[step for step, _ in points], [number(value) for _, value in points]])
    return (
        f'<li class="{series.style}" data-points="{html.escape(data)}"><i></i>{html.escape(series.name)} '
        f"<b>{number(points[-1][1])}</b></li>"
    )


def _thinned(points: Sequence[tuple[int, float | None]], log: bool) -> list[tuple[int, float | None]]:
    """At most about `MAX_POINTS` points: of each stretch the lowest and the highest, so that no spike is lost."""
    points = [(step, None if log and value is not None and value <= 0 else value) for step, value in points]
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch <= 2:
        return points
    kept: dict[int, float | None] = {}
    for start in range(0, len(points), stretch):
        some = points[start : start + stretch]
        there = sorted((value, step) for step, value in some if value is not None)
        ends = {step for _, step in (there[:1] + there[-1:])}
        kept |= {step: value for step, value in some if step in ends} or {some[0][0]: None}
    kept[points[-1][0]] = points[-1][1]
    return sorted(kept.items())


def _ticks(low: float | int, high: float | int, most: int = 5) -> list[float]:
    """Round numbers that enclose both."""
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float | int, high: float | int) -> list[float]:
    """Numbers 1, 2 or 5 times a power of ten that enclose both; powers of ten only over many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 5)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    inside = [mark for mark in marks if low < mark < high]
    below = max((mark for mark in marks if mark <= low), default=10.0**first)
    above = min((mark for mark in marks if mark >= high), default=10.0 ** (last + 1))
    return [below, *inside, above] if above > below else [below / 10, below * 10]
