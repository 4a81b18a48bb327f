"""The page is whole, needs nothing from outside, and shows nothing that it was not given."""

import html.parser
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from vit_flax.evals.samples import data_uri
from vit_flax.report import write_report
from vit_flax.report.charts import MAX_POINTS, Series, _log_ticks, _ticks, line_chart, number
from vit_flax.sinks.files import Files

ROOT = Path(__file__).parent.parent
EVIL = """<script>alert("1")</script>&'x"""
VOID = {"meta", "img", "link", "br", "hr", "input"}


def make_workdir(folder, *, names=("cat", EVIL), layers=True, evals=True):
    """What a run of two classes leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"run": {"seed": 0, "total_steps": 4}, "data": {"source": {"name": EVIL}}, "optim": {"lr": 1e-3}}
    record = {"config": config, "versions": {"jax": "0.10"}, "git": None, "command": ["main.py", EVIL]}
    facts = {
        "total_steps": 4,
        "num_params": 1234,
        "train_flops_per_image": 3e9,
        "num_train_examples": 9,
        "image_shape": [8, 8, 1],
        "device_kind": "cpu",
        "num_devices": 2,
        "peak_flops": None,
        "peak_source": None,
    }
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "facts.json").write_text(json.dumps(facts))
    sink = Files(workdir=folder, start_step=0)
    for step in range(1, 5):
        blocks = {f"train/grad_norm/block_{i}": 1.0 / step + i for i in range(3)} if layers else {}
        sink.scalars(step, {"train/loss": 2.0 / step, "train/grad_norm": None, "train/top1": 0.1 * step, **blocks})
    if evals:
        sink.scalars(4, {"val/top1": 0.625, "val/loss": 0.75, "val/ece": 0.0625, "val/ema_top1": 0.875})
        sink.picture(1, "train/batch", np.zeros((8, 8, 3), np.uint8))
        sink.picture(4, "val/confusion", np.zeros((8, 8, 3), np.uint8))
        (folder / "evals").mkdir()
        (folder / "evals/val.json").write_text(json.dumps(details(names)))
    sink.close()
    return folder


def details(names):
    v = len(names)
    matrix = np.full((v, v), 0)
    matrix[np.arange(v), np.arange(v)] = 3
    matrix[1, 0] = 7
    image = data_uri(np.zeros((8, 8, 1), np.uint8))
    sample = {"row": 3, "id": f"test/{EVIL}.png", "image": image, "probabilities": [0.9, 0.1], "classes": [0, 1]}
    return {
        "step": 4,
        "weights": "moving average of the parameters",
        "class_names": list(names),
        "confusion": matrix.tolist(),
        "class_count": matrix.sum(1).tolist(),
        "class_predicted": matrix.sum(0).tolist(),
        "class_top1": np.diag(matrix).tolist(),
        "samples": [sample | {"label": 1}, sample | {"label": 0}],
    }


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects what a browser would fetch and show."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.links, self.tags, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture
def page(tmp_path):
    text = write_report(make_workdir(tmp_path / "my run")).read_text()
    return text, Page(text)


def test_page_is_one_file_without_network(page):
    text, parsed = page
    assert parsed.links
    assert all(link.startswith("data:image/") for link in parsed.links)
    without_data = re.sub(r"data:image/[^\"]*", "", text)
    assert not re.search(r"https?:|@import|url\(|//[a-z]+\.[a-z]", without_data)
    assert [tag for tag, _ in parsed.tags if tag in ("link", "iframe", "object", "embed", "base")] == []


def test_text_from_outside_stays_text(page):
    text, parsed = page
    assert "<script>alert" not in text
    assert [tag for tag, _ in parsed.tags].count("script") == 1  # our own
    shown = " ".join(parsed.text)
    assert shown.count(EVIL) >= 5  # matrix, table, mistake, samples, config: as they are, not cut or changed
    assert all(not name.startswith("on") for _, attrs in parsed.tags for name in attrs)


def test_page_shows_what_the_run_found(page):
    _, parsed = page
    shown = " ".join(" ".join(parsed.text).split())
    for words in (
        "my run",
        "Finished: step 4 of 4",
        "1,234 parameters",
        "87.50 %",  # of the averaged weights, which the details are about
        "val top-1, averaged weights",
        "Top-1 accuracy",
        "Gradient per block",
        f"{EVIL} taken for cat: 7×",
        "0.625",
        "not a git checkout",
        "not known for this device",
        "main.py",
    ):
        assert words in shown, words
    images = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert len(images) == 3  # two samples and the training batch
    assert [attrs["class"] for tag, attrs in parsed.tags if attrs.get("class", "").startswith("sample ")] == [
        "sample wrong",
        "sample right",
    ]


def test_confusion_matrix_of_many_classes_is_a_picture_and_their_table_is_cut(tmp_path):
    parsed = Page(write_report(make_workdir(tmp_path, names=[f"class {i}" for i in range(50)])).read_text())
    assert len([1 for tag, attrs in parsed.tags if attrs.get("alt") == "confusion matrix"]) == 1
    assert "confusion" not in [attrs.get("class") for tag, attrs in parsed.tags if tag == "table"]
    assert "20 more classes" in parsed.text
    assert sum(text == f"class {i}" for text in parsed.text for i in range(50)) >= 50


def test_a_run_that_has_only_begun(tmp_path):
    folder = make_workdir(tmp_path, evals=False, layers=False)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "tra')
    shown = " ".join(Page(write_report(folder).read_text()).text)
    assert "Not finished: step 1 of 4" in shown
    assert "Confusion" not in shown
    (folder / "metrics.jsonl").write_text("")
    assert "Not finished: step 0 of 4" in " ".join(Page(write_report(folder).read_text()).text)


@pytest.mark.parametrize("worst", [0.99, 1.0])
def test_top_5_of_five_classes_has_no_chart(worst, tmp_path):
    folder = make_workdir(tmp_path)
    lines = [json.dumps({"step": step, "val/top5": value}) for step, value in ((1, worst), (2, 1.0))]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert ("Top-5 accuracy" in write_report(folder).read_text()) == (worst < 1)


def test_details_of_other_evaluations(tmp_path):
    folder = make_workdir(tmp_path)
    record = {"step": 4, "weights": "parameters", "class_names": ["a", "b"], "class_count": [3, 0], "samples": []}
    (folder / "evals/val.json").write_text(json.dumps(record | {"class_average_precision": [0.25, None]}))
    shown = " ".join(Page(write_report(folder).read_text()).text)
    assert "average precision" in shown
    assert "25.0%" in shown
    own = {
        "step": 4,
        "weights": "parameters",
        "class_names": ["a", "b"],
        "samples": [],
    }  # of an evaluation without details
    (folder / "evals/val.json").write_text(json.dumps(own))
    assert "Evaluation: val" not in write_report(folder).read_text()


def test_another_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config\.json in .*--workdir"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["facts.json", "evals/val.json"])
def test_a_damaged_file_is_named(name, tmp_path):
    folder = make_workdir(tmp_path)
    (folder / name).write_text('{"step":')
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        write_report(folder)


def test_command(tmp_path):
    command = [sys.executable, "-m", "vit_flax.report", "--workdir"]
    done = subprocess.run([*command, make_workdir(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "a" / "report.html"
    assert Path(done.stdout.strip()).exists()
    failed = subprocess.run([*command, tmp_path / "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: There is no config.json")
    assert "Traceback" not in failed.stderr


def test_a_locale_without_unicode_does_not_end_the_report(tmp_path):
    folder = make_workdir(tmp_path / "a", names=("caf\u00e9", "\u732b"))
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "vit_flax.report", "--workdir", folder]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caf\u00e9" in (folder / "report.html").read_text(encoding="utf-8")


def svg(chart):
    return ET.fromstring(re.search(r"<svg.*</svg>", chart)[0])


def points(chart):
    """The corners of every curve, in the coordinates of the picture."""
    paths = [path.get("d") for path in svg(chart).iter("path")]
    return [[tuple(map(float, p.split())) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", path)] for path in paths]


def test_curve_is_to_scale():
    chart = line_chart("t", [Series("s", [(0, 0.0), (50, 5.0), (100, 10.0)], "c0")])
    (curve,) = points(chart)
    (x0, y0), (x1, y1), (x2, y2) = curve
    assert (x1, y1) == (pytest.approx((x0 + x2) / 2, abs=0.1), pytest.approx((y0 + y2) / 2, abs=0.1))
    assert x0 < x2
    assert y0 > y2
    ticks = {float(t.text): float(t.get("y")) - 4 for t in svg(chart).iter("text") if t.get("text-anchor") == "end"}
    assert ticks[10.0] == pytest.approx(y2, abs=0.1)  # the axis says what the curve shows
    assert next(t.text for t in svg(chart).iter("text") if t.get("text-anchor") == "middle") == "step 0"


def test_logarithmic_axis():
    chart = line_chart("t", [Series("s", [(1, 0.01), (2, 0.1), (3, 1.0), (4, 0.0), (5, -1.0)], "c0")], log=True)
    (curve,) = points(chart)
    assert len(curve) == 3  # the others have no logarithm
    assert curve[0][1] - curve[1][1] == pytest.approx(curve[1][1] - curve[2][1], abs=0.11)


def test_missing_values_are_gaps():
    chart = line_chart("t", [Series("s", [(1, 1.0), (2, None), (3, 2.0), (4, 3.0)], "c0")])
    assert [path.get("d").count("M") for path in svg(chart).iter("path")] == [2]
    assert line_chart("t", [Series("s", [(1, None)], "c0")]) == ""
    assert line_chart("t", []) == ""


def test_long_curves_keep_their_spikes():
    values = np.zeros(100_000)
    values[[12_345, 77_777]] = [5.0, -5.0]
    chart = line_chart("t", [Series("s", list(enumerate(values.tolist())), "c0")])
    (curve,) = points(chart)
    assert len(curve) <= MAX_POINTS + 2
    heights = [y for _, y in curve]
    assert heights.index(min(heights)) < heights.index(max(heights))
    assert max(heights) - min(heights) > 150
    assert len(chart) < 20_000


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.42, 0.43), (-3.0, 1e6), (5.0, 5.0), (0.0, 0.0), (1e-9, 2e-9)])
def test_ticks_enclose(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize(("low", "high"), [(1.0, 10.0), (0.03, 0.04), (1e-9, 1e9), (5.0, 5.0), (1.0, 1.0), (2.1, 2.2)])
def test_log_ticks_enclose(low, high):
    ticks = _log_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 12


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.98607, "0.9861"),
        (12345.0, "12.3k"),
        (1234.0, "1,234"),
        (2.5e6, "2.5M"),
        (3e-4, "3e-4"),
        (6.77e-8, "6.77e-8"),
        (-0.5, "-0.5"),
        (100.0, "100"),
        (0.001, "0.001"),
        (3e12, "3e12"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text
