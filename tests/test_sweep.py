"""Sweeps: expanded, checked and named before anything runs; every point's end is noted."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_config
from vit_flax.config import ConfigError
from vit_flax.sweep import results, run
from vit_flax.sweep.points import Sweep, expand, load_sweep, point_name

ROOT = Path(__file__).parent.parent


def make(overrides):
    base = tiny_config(run__total_steps=2, checkpoint__every_steps=2).lock()
    return Sweep(Path("sweep.py"), "", base, expand(base, overrides, where="sweep.py"), ("test/top1",))


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/sweep.py")), ids=lambda path: path.parent.name)
def test_every_sweep_of_the_project_expands(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert len(sweep.points) > 1
    assert len(sweep.doc) > 100


def test_expanding_imports_no_jax():
    code = "import sys; from vit_flax.sweep import points; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_names_say_what_varies():
    points = make([{"optim.lr": 1e-3, "run.seed": 0}, {"optim.lr": 2e-3, "run.seed": 0}]).points
    assert [point.name for point in points] == ["lr=0.001", "lr=0.002"]
    assert point_name({"a.x": 1, "b.x": (2, 3)}) == "a.x=1,b.x=2x3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([{"optim.ler": 1}], r"no key 'optim\.ler'\. Did you mean 'optim\.lr'\?"),
        ([{"optim.lr": "high"}], "high"),
        ([{"run.seed": 1}, {"run.seed": 2}, {"run.seed": 1}], "points 0 and 2 are the same"),
        ([], "no points"),
    ],
)
def test_bad_sweeps(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(overrides)


def test_a_failing_point_is_noted_and_the_others_are_kept(tmp_path):
    sweep = make([{"model.num_heads": 2}, {"model.num_heads": 3}])
    assert run.run_point(sweep, tmp_path, 0)["status"] == "done"
    assert run.run_point(sweep, tmp_path, 1)["status"] == "failed"
    assert [point.index for point in run.pending(tmp_path, sweep)] == [1]
    rows = results.collect(tmp_path, sweep)
    results.write_csv(tmp_path / "results.csv", rows)
    header, done, failed = (tmp_path / "results.csv").read_text().splitlines()[:3]
    assert header.startswith("name,model.num_heads,status,")
    assert "done" in done
    assert "failed" in failed
