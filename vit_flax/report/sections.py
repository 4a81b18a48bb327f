"""The sections of the report; each takes what was read from the workdir and returns HTML, empty where there is nothing.

Every text from outside (class names, file names, the config) goes through `html.escape`.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vit_flax.config import flatten
from vit_flax.report.charts import Series, line_chart, number

Line = Mapping[str, Any]

MAX_TABLE_CLASSES = 30  # a larger confusion matrix is shown as a picture, a longer table of classes folded up
MAX_CLASSES = 1000  # rows of the table, folded up or not

# Metric -> title, whether its axis is logarithmic, a note for charts with several curves.
LEARNING = {
    "loss": ("Loss", False, "Training: augmented, and with smoothed labels, where the config says so."),
    "top1": ("Top-1 accuracy", False, "Training: on the batches as augmented."),
    "mean_average_precision": ("Mean average precision", False, ""),
    "top5": ("Top-5 accuracy", False, ""),
    "ece": ("Calibration error (ECE)", False, ""),
    "lr": ("Learning rate", False, ""),
}
ENGINE = {
    "grad_norm": ("Norm of the gradient", True, ""),
    "update_norm": ("Norm of the update", True, ""),
    "param_norm": ("Norm of the parameters", False, ""),
    "images_per_sec": ("Images per second", False, ""),
    "data_wait_percent": ("Waiting for data, %", False, ""),
    "mfu_percent": ("Model FLOPs utilisation, %", False, ""),
    "device_memory_gib": ("Peak device memory, GiB", False, ""),
}
NOT_DRAWN = ("count", "skipped")
AVERAGE = "averaged weights"


def header(name: str, facts: Line, record: Line, last_step: int) -> str:
    """Name of the run, how far it is, on what."""
    total = facts["total_steps"]
    state = "Finished" if last_step >= total else "Not finished"
    git = record["git"]
    commit = [f"commit {git['commit'][:10]}{' with uncommitted changes' if git['dirty'] else ''}"] if git else []
    about = [
        f"{state}: step {last_step:,} of {total:,}",
        f"{facts['num_params']:,} parameters",
        f"{facts['num_devices']} × {facts['device_kind']}",
        *commit,
    ]
    return (
        f'<header><p class="kicker">vit_flax run</p><h1>{escape(name)}</h1><p>{escape(" · ".join(about))}</p></header>'
    )


def tiles(evals: Mapping[str, Line], lines: Sequence[Line]) -> str:
    """The numbers that one looks for first."""
    last = latest(lines)
    cells = []
    for name, details in evals.items():
        prefix = "ema_" if details["weights"] != "parameters" else ""
        for metric, label in (("top1", "top-1"), ("mean_average_precision", "mAP"), ("loss", "loss"), ("ece", "ECE")):
            value = last.get(f"{name}/{prefix}{metric}")
            if value is not None:
                text = (
                    f"{100 * value:.2f}<small>%</small>"
                    if metric in ("top1", "mean_average_precision")
                    else number(value)
                )
                cells.append((text, f"{name} {label}" + (f", {AVERAGE}" if prefix else "")))
    if last.get("train/images_per_sec"):
        cells.append((number(last["train/images_per_sec"]), "images per second"))
    boxes = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for value, label in cells)
    return f'<section class="tiles">{boxes}</section>' if boxes else ""


def learning(lines: Sequence[Line]) -> str:
    """A chart of each figure of merit, with training and every evaluation in it."""
    groups = _by_metric(lines)
    if all(value == 1 for points in groups.get("top5", {}).values() for _, value in points):
        groups.pop("top5", None)  # of up to five classes, all are among the first five
    unknown = {metric: (metric, False, "") for metric in groups if metric not in ENGINE | LEARNING}
    return _charts("Curves", _draw(groups, LEARNING | unknown))


def engine(lines: Sequence[Line]) -> str:
    """Charts of norms and of speed."""
    layers = [_layers(lines, "grad_norm", "Gradient per block"), _layers(lines, "update_norm", "Update per block")]
    return _charts("Norms and speed", [*_draw(_by_metric(lines), ENGINE), *layers])


def _by_metric(lines: Sequence[Line]) -> dict[str, dict[str, list[tuple[int, float | None]]]]:
    """Metric -> what it was measured on -> points; the moving average is another thing to measure on."""
    groups: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
    for line in lines:
        for name, value in line.items():
            source, _, metric = name.partition("/")
            label = f"{source}, {AVERAGE}" if metric.startswith("ema_") else source
            metric = metric.removeprefix("ema_")
            if metric and metric not in NOT_DRAWN and "/" not in metric:
                groups.setdefault(metric, {}).setdefault(label, []).append((line["step"], value))
    return groups


def _draw(groups: Mapping[str, Mapping[str, Any]], titles: Mapping[str, tuple[str, bool, str]]) -> list[str]:
    labels = list(dict.fromkeys(label for curves in groups.values() for label in curves))
    labels.sort(key=lambda label: label != "train")  # which has the first colour everywhere
    charts = []
    for metric, (title, log, note) in titles.items():
        curves = groups.get(metric, {})
        series = [Series(label, points, f"c{labels.index(label) % 6}") for label, points in curves.items()]
        charts.append(line_chart(title, series, log=log, note=note if len(series) > 1 else ""))
    return charts


def _charts(title: str, charts: Sequence[str]) -> str:
    return f'<section><h2>{title}</h2><div class="charts">{"".join(charts)}</div></section>' if any(charts) else ""


def _layers(lines: Sequence[Line], metric: str, title: str) -> str:
    """The norms per block in one chart, from the first block, light, to the last, dark; other modules dashed."""
    parts: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(f"train/{metric}/"):
                parts.setdefault(name.removeprefix(f"train/{metric}/"), []).append((line["step"], value))
    blocks = [name for name in parts if name.startswith("block_")]
    blocks.sort(key=lambda name: int(name.removeprefix("block_")))
    others = [name for name in parts if name not in blocks]
    depth = max(len(blocks) - 1, 1)
    series = [Series(name, parts[name], f"d{round(9 * i / depth)}") for i, name in enumerate(blocks)]
    series += [Series(name, parts[name], f"c{i % 6} dashed") for i, name in enumerate(others)]
    return line_chart(title, series, log=True)


def results(lines: Sequence[Line]) -> str:
    """The last value of every number, with the weights and their average side by side."""
    last = latest(lines)
    sources = list(dict.fromkeys(name.split("/")[0] for name in last if name != "step"))
    tables = []
    for source in sources:
        own = {name.removeprefix(f"{source}/"): value for name, value in last.items() if name.startswith(f"{source}/")}
        own = {name: value for name, value in own.items() if "/" not in name}
        average = any(name.startswith("ema_") for name in own)
        head = "<th>parameters</th><th>moving average</th>" if average else "<th></th>"
        rows = []
        for name, value in own.items():
            if not name.startswith("ema_"):
                cells = [value, own.get(f"ema_{name}")] if average else [value]
                shown = "".join(f"<td>{'–' if v is None else number(v)}</td>" for v in cells)
                rows.append(f"<tr><th>{escape(name)}</th>{shown}</tr>")
        tables.append(f"<table><thead><tr><th>{escape(source)}</th>{head}</tr></thead>{''.join(rows)}</table>")
    return f'<section><h2>Results</h2><div class="tables">{"".join(tables)}</div></section>' if tables else ""


def evaluation(name: str, details: Line, pictures: Path) -> str:
    """Confusion matrix, table of the classes and sample predictions of one evaluation."""
    about = f"After step {details['step']:,}, with the {details['weights']}."
    parts = [_confusion(details, pictures / name / "confusion.png"), _classes(details)]
    samples = _samples(details)
    if not any(parts) and not samples:
        return ""
    title = f'<h2>Evaluation: {escape(name)}</h2><p class="note">{escape(about)}</p>'
    return f'<section>{title}<div class="pair">{"".join(parts)}</div>{samples}</section>'


def _confusion(details: Line, picture: Path) -> str:
    if "confusion" not in details:
        return ""
    names, matrix = details["class_names"], details["confusion"]
    if len(names) > MAX_TABLE_CLASSES:
        image = f'<img class="paper" alt="confusion matrix" src="{_png_uri(picture)}">' if picture.exists() else ""
        return f"<div><h3>Confusion matrix</h3>{image}{_mistakes(names, matrix)}</div>"
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    rows = []
    for i, counts in enumerate(matrix):
        total = max(sum(counts), 1)
        cells = []
        for j, count in enumerate(counts):
            if not count:
                cells.append("<td></td>")
                continue
            shade = f"--part:{100 * (count / total) ** 0.5:.0f}%"
            strong = " strong" if count / total > 0.35 else ""
            hint = escape(f"{names[i]} taken for {names[j]}: {count} of {sum(counts)}")
            cells.append(
                f'<td class="{"right" if i == j else "wrong"}{strong}" style="{shade}" title="{hint}">{count}</td>'
            )
        rows.append(f'<tr><th scope="row">{escape(names[i])}</th>{"".join(cells)}</tr>')
    table = f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return (
        f'<div><h3>Confusion matrix</h3><p class="note">Rows: true class. Columns: predicted.</p>'
        f'<div class="scroll">{table}</div>{_mistakes(names, matrix)}</div>'
    )


def _mistakes(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    pairs = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
    pairs.sort(reverse=True)
    items = "".join(f"<li>{escape(names[i])} taken for {escape(names[j])}: {count}×</li>" for count, i, j in pairs[:5])
    return f'<h3>Most frequent mistakes</h3><ul class="plain">{items}</ul>' if items else ""


def _classes(details: Line) -> str:
    if "class_count" not in details:  # an evaluation of the user's own
        return ""
    names, counts = details["class_names"], details["class_count"]
    if "class_average_precision" in details:
        head, columns = ("average precision",), [details["class_average_precision"]]
    elif "class_top1" in details:
        head = ("recall", "precision")
        recall = [hit / n if n else None for hit, n in zip(details["class_top1"], counts)]
        precision = [hit / n if n else None for hit, n in zip(details["class_top1"], details["class_predicted"])]
        columns = [recall, precision]
    else:
        return ""
    order = sorted(range(len(names)), key=lambda i: (columns[0][i] is None, columns[0][i], -counts[i]))
    rows = []
    for i in order:
        bars = "".join(_bar(column[i]) for column in columns)
        rows.append(f"<tr><th>{escape(names[i])}</th><td>{counts[i]:,}</td>{bars}</tr>")
    titles = "".join(f"<th>{title}</th>" for title in head)
    start = f'<table class="classes"><thead><tr><th>class</th><th>examples</th>{titles}</tr></thead>'
    table = f"{start}{''.join(rows[:MAX_TABLE_CLASSES])}</table>"
    if rest := rows[MAX_TABLE_CLASSES:MAX_CLASSES]:
        table += f"<details><summary>{len(rest):,} more classes</summary>{start}{''.join(rest)}</table></details>"
    if len(rows) > MAX_CLASSES:
        table += f'<p class="note">And {len(rows) - MAX_CLASSES:,} better ones, in the JSON file of the evaluation.</p>'
    return f'<div><h3>Classes</h3><p class="note">The lowest first.</p>{table}</div>'


def _bar(part: float | int | None) -> str:
    return "<td>–</td>" if part is None else f'<td class="bar" style="--part:{100 * part:.1f}%">{100 * part:.1f}%</td>'


def _samples(details: Line) -> str:
    names = details["class_names"]
    groups = {"Wrong, the surest first": [], "Right": []}
    for sample in details.get("samples", []):
        right = sample["classes"][0] == sample["label"]
        bars = "".join(
            f'<li style="--part:{100 * p:.1f}%"{" class=true" if c == sample["label"] else ""}>'
            f"<span>{escape(names[c])}</span><span>{100 * p:.0f}%</span></li>"
            for c, p in list(zip(sample["classes"], sample["probabilities"]))[:3]
        )
        verdict = "✓" if right else "✗"
        truth = f'<p class="truth"><b>{verdict}</b> {escape(names[sample["label"]])}</p>'
        image = f'<img src="{escape(sample["image"])}" alt="{escape(names[sample["label"]])}" loading="lazy">'
        card = (
            f'<figure class="sample {"right" if right else "wrong"}" title="{escape(sample["id"])}">{image}{truth}'
            f"<ol>{bars}</ol><figcaption><bdi>{escape(sample['id'])}</bdi></figcaption></figure>"
        )
        groups["Right" if right else "Wrong, the surest first"].append(card)
    return "".join(
        f'<h3>{title}</h3><div class="samples">{"".join(cards)}</div>' for title, cards in groups.items() if cards
    )


def training_batch(pictures: Path) -> str:
    """The first batch as the model saw it."""
    picture = pictures / "train" / "batch.png"
    if not picture.exists():
        return ""
    image = f'<img class="paper" alt="images of the first batch with their labels" src="{_png_uri(picture)}">'
    return f'<section><h2>Training pictures</h2><p class="note">As augmented, with their targets.</p>{image}</section>'


def origins(record: Line, facts: Line) -> str:
    """Config, command, versions, devices."""
    config = record["config"]
    cards = []
    for section, values in config.items():
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in flatten(values).items())
        cards.append(f"<table><thead><tr><th colspan=2>{escape(section)}</th></tr></thead>{rows}</table>")
    git = record["git"] or {"commit": "not a git checkout", "dirty": False}
    software = {
        "command": " ".join(record["command"]),
        "git": git["commit"] + (" with uncommitted changes" if git["dirty"] else ""),
        "devices": f"{facts['num_devices']} × {facts['device_kind']}",
        "arithmetic": f"{number(facts['train_flops_per_image'] / 1e9)} GFLOP per training image",
        "peak for MFU": f"{number(facts['peak_flops'] / 1e12)} TFLOP/s per device, {facts['peak_source']}"
        if facts["peak_flops"]
        else "not known for this device",
        **record["versions"],
    }
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in software.items())
    return (
        f'<section><h2>Config</h2><div class="tables">{"".join(cards)}</div></section>'
        f"<section><h2>Origin</h2><table class=wide>{rows}</table></section>"
    )


def latest(lines: Sequence[Line]) -> dict[str, Any]:
    """The last value of every number."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    return last


def _png_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
