"""Sweeps: expanded, checked and named before anything runs; every point's end is noted."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.helpers import tiny_config
from vit_flax.config import ConfigError
from vit_flax.sweep import __main__, results, run
from vit_flax.sweep.check import check
from vit_flax.sweep.page import write_page
from vit_flax.sweep.points import Sweep, expand, load_sweep, point_name, suggested
from vit_flax.workdir import lock

ROOT = Path(__file__).parent.parent


def make(overrides):
    base = tiny_config(run__total_steps=2, checkpoint__every_steps=2).lock()
    return Sweep(Path("sweep.py"), "", base, expand(base, overrides, where="sweep.py"), ("test/top1",))


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/sweep.py")), ids=lambda path: path.parent.name)
def test_every_sweep_of_the_project_expands(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert len(sweep.points) > 1 or sweep.suggest is not None
    assert len(sweep.doc) > 100


def test_expanding_imports_no_jax():
    code = "import sys; from vit_flax.sweep import points; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_names_say_what_varies():
    points = make([{"optim.lr": 1e-3, "run.seed": 0}, {"optim.lr": 2e-3, "run.seed": 0}]).points
    assert [point.name for point in points] == ["lr=0.001", "lr=0.002"]
    assert point_name({"a.x": 1, "b.x": (2, 3)}) == "a.x=1,b.x=2x3"
    long = [point_name({f"a.key{i}": 1 / 3 for i in range(20)} | {"b.last": last}) for last in (1, 2)]
    assert long[0] != long[1]
    assert max(map(len, long)) < 255


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([{"optm.lr": 1}], r"no key 'optm\.lr'\. Did you mean 'optim\.lr'\?"),
        ([{"optim.lr.x": 1}], r"no key 'optim\.lr\.x'"),
        ([{"evals.test": 1}], r"no key 'evals\.test'"),
        ([{"sinks.csv": 1}], r"no key 'sinks\.csv'.*A section that it leaves out"),
        ([{}, {"evals.extra": {"type": "classification"}}], r"point 1: 'evals\.extra' is given a whole section"),
        ([{"lr": 1e-3}], r"no key 'lr'\. Did you mean 'optim\.lr'\?"),
        ([{"optim.lr": "high"}], r"optim\.lr: expected a value such as 0\.002, which the base has, found 'high'"),
        ([{"run.seed": 0.5}], r"run\.seed: expected a value such as 0, which the base has, found 0\.5"),
        ([{"run.seed": 1}, {"run.seed": 2}, {"run.seed": 1}], "points 0 and 2 are the same"),
        ([], "no points"),
        ([{"run.seed": 0}, ["optim.lr", 1e-3]], r"point 1: expected dotted keys and values, .* found \['optim\.lr'"),
        ([{1: 2}], r"point 0: expected dotted keys and values, .* found {1: 2}"),
    ],
)
def test_bad_sweeps(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(overrides)


def test_keys_that_the_base_leaves_at_their_defaults(tmp_path):
    sweep = make([{}, {"optim.b1": 0.8}, {"optim.b1": 0.7, "model.dropout": 0.1}])
    assert [point.name for point in sweep.points] == [
        "b1=default,dropout=default",
        "b1=0.8,dropout=default",
        "b1=0.7,dropout=0.1",
    ]
    assert sweep.points[2].config["optim"]["b1"] == 0.7
    assert "b1" not in sweep.points[0].config["optim"]
    assert check(sweep.path, sweep.points, ["-test/loss", "train/loss"]) == [2, 2, 2]
    rows = results.collect(tmp_path, sweep)
    assert [row.values["optim.b1"] for row in rows] == ["default", 0.8, 0.7]
    assert suggested(sweep.base, {"optim.b1": 0.8}, 0, where="trial 0").name == "b1=0.8"


def test_a_duration_in_another_unit_replaces_that_of_the_base():
    sweep = make([{"run.total_steps": 3}, {"run.total_epochs": 1.0, "evals.test.every_epochs": 1.0}])
    assert [point.config["run"].keys() & {"total_steps", "total_epochs"} for point in sweep.points] == [
        {"total_steps"},
        {"total_epochs"},
    ]
    assert sweep.points[1].config["evals"]["test"].keys() == {"type", "every_epochs"}


def test_keys_that_nobody_has_are_found_before_the_first_point_starts():
    sweep = make([{"run.seed": 0}, {"optim.ler": 1.0}])
    with pytest.raises(ConfigError, match=r"point 1 .*unknown key optim\.ler: did you mean optim\.lr\?"):
        check(sweep.path, sweep.points, sweep.metrics)


@pytest.mark.parametrize("metric", ["test/top_1", "-test/ema_top1", "top1"])
def test_metrics_that_no_point_will_have_are_found_before_the_first_one_starts(metric):
    points = make([{"run.seed": 0}]).points
    with pytest.raises(ConfigError, match=rf"{metric.removeprefix('-')}', which no evaluation finds: .*test/top1, "):
        check(Path("sweep.py"), points, ["test/top1", metric])
    averaged = make([{"run.seed": 0}, {"run.ema_decay": 0.9}]).points
    if metric == "-test/ema_top1":
        check(Path("sweep.py"), averaged, [metric])


def test_a_failing_point_is_noted_and_the_others_are_kept(tmp_path):
    sweep = make([{"model.num_heads": 2}, {"model.num_heads": 3}])
    assert run.run_point(sweep.points[0], tmp_path)["status"] == "done"
    assert run.run_point(sweep.points[1], tmp_path)["status"] == "failed"
    assert [point.index for point in run.pending(tmp_path, sweep)] == [1]
    rows = results.collect(tmp_path, sweep)
    results.write_csv(tmp_path / "results.csv", rows)
    header, done, failed = (tmp_path / "results.csv").read_text().splitlines()[:3]
    assert header.startswith("name,model.num_heads,status,")
    assert "done" in done
    assert "failed" in failed


SWEEP = "def sweep(): yield {'optim.lr': 1e-3}\n"
SUGGEST = "def suggest(trial): return {'optim.lr': trial.suggest_float('lr', 1e-4, 1e-2)}\n"
METRICS = "def metrics(): return ['test/top1']\n"
BASE = f"BASE = {str(ROOT / 'configs' / 'digits.py')!r}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BASE + METRICS, r"has no sweep: .*or, for a search with Optuna, suggest\(trial\)"),
        (BASE + METRICS + SWEEP + SUGGEST, r"has both sweep\(\) and suggest\(trial\)"),
        (SWEEP, "has no BASE and no metrics"),
        *((BASE + SWEEP + f"def metrics(): return {names}", "at least one metric") for names in ("[]", "'test/top1'")),
        (BASE + SWEEP + "metrics = ['test/top1']", r"metrics has to be a function, found \['test/top1'\]"),
        (BASE + METRICS + "def sweep(): pass", r"sweep\(\) has to yield the points.* found None"),
        (BASE + METRICS + "def sweep():\n    yield {}['x']", r"sweep\.py, line 4, raises\nKeyError: 'x'"),
        ("BASE = 1 / 0", r"sweep\.py, line 1, raises\nZeroDivisionError"),
        ("BASE = None\n" + METRICS + SWEEP, "BASE has to be a config file, .* found None"),
        ("BASE = 'no.py'\n" + METRICS + SWEEP, r"no file no\.py \(a config\)"),
        ("BASE = 'base.py'\n" + METRICS + SWEEP, r"base\.py has no get_config\(\)"),
        ("BASE = 'base.py'\n" + METRICS + SWEEP + "# raises", r"base\.py, line 1, raises\nKeyError: 1"),
    ],
)
def test_bad_sweep_files(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("sweep.py").write_text(content)
    Path("base.py").write_text("def get_config(): return {}[1]" if "# raises" in content else "get = 1")
    with pytest.raises(ConfigError, match=message):
        load_sweep("sweep.py")


def test_a_base_of_plain_dicts(tmp_path):
    (tmp_path / "base.py").write_text("def get_config(): return {'optim': {'lr': 1.0}}")
    (tmp_path / "sweep.py").write_text(f"BASE = {str(tmp_path / 'base.py')!r}\n" + METRICS + SWEEP)
    assert load_sweep(tmp_path / "sweep.py").points[0].config == {"optim": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (SWEEP, ["--trials", "3"], "sweep() in place of suggest(trial)"),
        (SUGGEST, [], "give the number of --trials"),
        (SUGGEST, ["--trials", "0"], "--trials=0"),
        (SUGGEST, ["--trials", "3", "--search", "halving"], "not sweep()"),
        (SUGGEST, ["--trials", "3", "--vmap"], "not with --vmap"),
        (SWEEP, ["--search", "halving", "--point", "0"], "not with --vmap or --point"),
        (SWEEP, ["--search", "halving", "--halving_factor", "1"], "--halving_factor=1"),
        (SWEEP, ["--search", "halving", "--min_steps", "100000"], "--min_steps=100000: expected 1 to 824"),
        (SWEEP, ["--jobs", "0"], "--jobs=0"),
        (SWEEP, ["--vmap", "--max_members", "-1"], "--max_members=-1: expected 1 or more"),
        (SWEEP, ["--vmap", "--jobs", "2"], "not with --jobs, --launcher or --point"),
        (SWEEP, ["--vmap", "--point", "0"], "not with --jobs, --launcher or --point"),
        (SWEEP, ["--vmap", "--launcher", "slurm"], "not with --jobs, --launcher or --point"),
        (SWEEP, ["--max_members", "2"], "--max_members is for --vmap"),
        (SWEEP, ["--halving_factor", "1"], "--halving_factor=1"),
        (SWEEP, ["--min_steps", "40"], "--min_steps is for --search halving"),
        ("def suggest(trial): pass", ["--trials", "1"], "trial 0: expected dotted keys and values"),
        (SWEEP, ["--point", "1"], "--point=1"),
        (SUGGEST.replace("optim.lr", "optim.ler"), ["--trials", "3"], "did you mean optim.lr?"),
        (SUGGEST.replace("1e-4", "1"), ["--trials", "3"], "suggest(trial) for trial 0: ValueError"),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, capsys, content, flags, message):
    """A message before anything is written."""
    if "--trials" in flags:
        pytest.importorskip("optuna")
    (tmp_path / "sweep.py").write_text(BASE + METRICS + content)
    arguments = ["--sweep", str(tmp_path / "sweep.py"), "--workdir", str(tmp_path / "run"), *flags]
    # What is not refused would train 824 steps and more.
    monkeypatch.setattr(__main__, "_run_here", lambda *_: pytest.fail("The sweep has started."))
    assert command(monkeypatch, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_workdir_is_asked_for_before_the_points_are_built(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.py").write_text(BASE + METRICS + SWEEP)
    monkeypatch.setattr(__main__, "check_apart", lambda *_: pytest.fail("The points are built."))
    assert command(monkeypatch, ["--sweep", str(tmp_path / "sweep.py")]) == 2
    assert "--workdir is needed" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["[1]", "gpus_per_node=1"])
def test_launcher_options_are_a_json_object(options, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, ["--sweep", "sweep.py", "--launcher_options", options])
    assert end.value.code == 2
    assert f"expected a JSON object, such as '{{\"gpus_per_node\": 1}}', found '{options}'" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_an_error_with_a_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.py").write_text(BASE + METRICS + SWEEP)
    (tmp_path / "run").write_text("")
    assert command(monkeypatch, ["--sweep", str(tmp_path / "sweep.py"), "--workdir", str(tmp_path / "run")]) == 2
    assert "Choose a --workdir" in capsys.readouterr().err


def command(monkeypatch, arguments):
    """The exit code of `python -m vit_flax.sweep`, in this process."""
    monkeypatch.setattr(sys, "argv", ["vit_flax.sweep", *arguments])
    monkeypatch.setattr(__main__, "exit_on_signals", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # put back after --vmap
    return __main__.main()


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch, capsys):
    for content, package, flags in ((SUGGEST, "optuna", ["--trials", "1"]), (SWEEP, "submitit", [])):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / "sweep.py").write_text(BASE + METRICS + content)
        arguments = ["--sweep", str(tmp_path / "sweep.py"), "--workdir", str(tmp_path / "run"), *flags]
        assert command(monkeypatch, arguments) == 2
        assert "pip install 'vit_flax[sweep]'" in capsys.readouterr().err


def test_a_workdir_belongs_to_one_search(tmp_path):
    sweep = make([{"optim.lr": 1e-3}, {"optim.lr": 2e-3}])
    run.claim(tmp_path, sweep, {"rungs": [3, 9], "factor": 3})
    run.claim(tmp_path, sweep)  # every point to its end: goes on with what is there
    run.claim(tmp_path, sweep, {"rungs": [3, 9], "factor": 3})
    with pytest.raises(ConfigError, match=r"another search:\n  rungs: there \[3, 9\], here \[1, 3, 9\]"):
        run.claim(tmp_path, sweep, {"rungs": [1, 3, 9], "factor": 3})


def test_two_commands_in_one_workdir_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.py").write_text(BASE + METRICS + SWEEP)
    with lock(tmp_path / "run"):
        arguments = ["--sweep", str(tmp_path / "sweep.py"), "--workdir", str(tmp_path / "run")]
        assert command(monkeypatch, arguments) == 2
    assert "is in use by process" in capsys.readouterr().err


def done(workdir, points):
    for point in points:
        folder = run.point_workdir(workdir, point)
        run.write_result(folder, point, status="done", step=2, metrics={"test/top1": 0.5}, secs=60.0)


def test_a_point_that_is_done_stays_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "sweep.py").write_text(f"BASE = {str(ROOT / 'tests' / 'configs' / 'tiny.py')!r}\n" + METRICS + SWEEP)
    done(tmp_path / "run", load_sweep(tmp_path / "sweep.py").points)
    monkeypatch.setattr(run, "run_point", lambda *_: pytest.fail("trained again"))
    flags = ["--sweep", str(tmp_path / "sweep.py"), "--workdir", str(tmp_path / "run"), "--point", "0"]
    assert command(monkeypatch, flags) == 0


def test_a_result_that_is_damaged_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.py").write_text(f"BASE = {str(ROOT / 'tests' / 'configs' / 'tiny.py')!r}\n" + METRICS + SWEEP)
    points = load_sweep(tmp_path / "sweep.py").points
    done(tmp_path / "run", points)
    (run.point_workdir(tmp_path / "run", points[0]) / "result.json").write_text("")
    flags = ["--sweep", str(tmp_path / "sweep.py"), "--workdir", str(tmp_path / "run"), "--point", "0"]
    assert command(monkeypatch, flags) == 2
    assert "result.json is damaged" in capsys.readouterr().err


def test_a_sweep_whose_output_nobody_reads_any_more_goes_on(tmp_path, monkeypatch):
    (tmp_path / "sweep.py").write_text(BASE + METRICS + SWEEP)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        assert command(monkeypatch, ["--sweep", str(tmp_path / "sweep.py"), "--dry_run"]) == 0


def test_folders_of_points_that_the_file_has_no_more_are_named(tmp_path, monkeypatch, capsys):
    """Another key that varies gives all points other names."""
    monkeypatch.setattr(run, "run", lambda *_, say, **__: say("[1/1] [a] done"))
    arguments = __main__._parser().parse_args(["--sweep", "sweep.py"])
    before = [{"optim.lr": 1e-3}, {"optim.lr": 2e-3}]
    for overrides, left in ((before, None), ([*before, {"optim.lr": 2e-3, "run.seed": 1}], "lr=0.001.")):
        sweep = make(overrides)
        done(tmp_path, sweep.points)
        assert __main__._run_here(sweep, tmp_path, None, arguments, Console(width=200)) == 0
        said = capsys.readouterr().out
        assert "[1/1] [a] done" in said
        assert ("2 of the folders in" in said) == (left is not None)
        assert left is None or f"such as {left} They are left as they are." in said


def test_the_table_and_the_page_say_where_a_search_stopped_each_point(tmp_path, capsys):
    """Whoever got further comes first, whatever the metric; seeds that got to different steps are not averaged."""
    sweep = make([{"optim.lr": lr, "run.seed": seed} for lr in (1e-3, 2e-3, 4e-3) for seed in (0, 1)])
    ends = [("done", 2, 0.3), ("stopped", 1, 0.2), ("stopped", 1, 0.9), ("stopped", 1, 0.8), ("failed", None, None)]
    for point, (status, step, top1) in zip(sweep.points, ends):
        entries = {} if status == "failed" else dict(step=step, metrics={"test/top1": top1})
        run.write_result(run.point_workdir(tmp_path, point), point, status=status, secs=1.0, error="E", **entries)
    rows = results.collect(tmp_path, sweep)
    ranked = results.settings(rows, "test/top1", True)
    assert [(s.values["optim.lr"], results.stop_of(s)) for s in ranked] == [
        (1e-3, "the end"),
        (2e-3, "step 1"),
        (1e-3, "step 1"),
        (4e-3, "-"),
    ]
    assert [len(setting.rows) for setting in ranked] == [1, 2, 1, 2]
    results.print_table(Console(width=110), sweep, rows)
    assert "stopped after" in capsys.readouterr().out
    page = write_page(tmp_path, sweep, rows).read_text()
    assert "1 of 6 points to the end, 3 stopped before" in page
    assert "<td>step 1</td>" in page
    results.write_csv(tmp_path / "results.csv", rows)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[1] == '"lr=0.001,seed=0",0.001,0,done,2,0.3,1.0,E'
    assert lines[2] == '"lr=0.001,seed=1",0.001,1,stopped,1,0.2,1.0,E'


def test_the_page_takes_values_that_are_lists(tmp_path):
    sweep = make([{"optim.lr": lr, "augment.mean": (mean,)} for lr in (1e-3, 2e-3) for mean in (0.4, 0.6)])
    for point in sweep.points:
        folder = run.point_workdir(tmp_path, point)
        run.write_result(folder, point, status="done", step=2, metrics={"test/top1": point.index / 4}, secs=1.0)
    page = write_page(tmp_path, sweep, results.collect(tmp_path, sweep)).read_text()
    assert "optim.lr down, augment.mean across" in page
    assert "<th>[0.6]</th>" in page


def test_the_page_names_the_sweep_and_puts_whole_numbers_and_others_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = make([{"optim.lr": lr, "model.dropout": rate} for lr in (1e-3, 2e-3) for rate in (0.5, 1, 0, 0.25)])
    for point in points.points:
        folder = run.point_workdir(tmp_path, point)
        run.write_result(folder, point, status="done", step=2, metrics={"test/top1": point.index / 8}, secs=1.0)
    for file, name in (("sweep.py", tmp_path.name), ("rates.py", "rates")):
        sweep = dataclasses.replace(points, path=Path(file))
        page = write_page(tmp_path, sweep, results.collect(tmp_path, sweep)).read_text()
        assert f"<h1>{name}</h1>" in page
        assert "<h2>Question</h2>" not in page  # the file has no docstring
        assert "<th>0</th><th>0.25</th><th>0.5</th><th>1</th>" in page
        axes = page[page.index("parallel coordinates") :]
        assert re.findall(r'tick halo"[^>]*>([^<]*)<', axes)[2:6] == ["0", "0.25", "0.5", "1"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_page_takes_a_metrics_file_whose_last_line_is_half_written(tmp_path, seeds):
    sweep = make([{"optim.lr": lr, "run.seed": seed} for lr in (1e-3, 2e-3) for seed in seeds])
    for point in sweep.points:
        folder = run.point_workdir(tmp_path, point)
        run.write_result(folder, point, status="done", step=2, metrics={"test/top1": 0.5}, secs=1.0)
        lines = [json.dumps({"step": step, "test/top1": 0.5}) for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "tes']))
    page = write_page(tmp_path, sweep, results.collect(tmp_path, sweep)).read_text()
    assert "The best 2" in page
    assert ("The first seed of each." in page) == (len(seeds) > 1)


def test_the_command_checks_its_points_without_jax_in_its_own_process(tmp_path):
    """On an accelerator it would hold the memory that the points need."""
    (tmp_path / "sweep.py").write_text(
        'BASE = "tests/configs/tiny.py"\ndef sweep(): yield {"optim.lr": -1.0}\ndef metrics(): return ["test/top1"]\n'
    )
    program = (
        "import sys; from vit_flax.sweep.__main__ import main\n"
        f"sys.argv = ['sweep', '--sweep', '{tmp_path}/sweep.py', '--workdir', '{tmp_path}/w']\n"
        "assert main() == 2 and 'jax' not in sys.modules, sorted(sys.modules)[:5]"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "optim.lr=-1.0: expected a number of 0 or more" in done.stderr


def rows_of(values, metric):
    """Rows that ended well, from lists of values by key and a list of the metric."""
    return [
        results.Row(f"p{i}", {key: column[i] for key, column in values.items()}, "done", 2, {"m": y}, 1.0, None)
        for i, y in enumerate(metric)
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_seeds_without_a_finite_number_have_no_mean_and_spoil_nothing(bad):
    rows = rows_of({"optim.lr": [1, 1, 2, 2], "run.seed": [0, 1, 0, 1]}, [0.5, 0.7, 0.5, 0.6])
    rows[1] = dataclasses.replace(rows[1], metrics={"n": 1.0} if bad is None else {"m": bad})
    best, other = results.settings(rows, "m", larger_is_better=True)
    assert (best.values["optim.lr"], best.mean["m"], best.std["m"]) == (2, 0.55, pytest.approx(0.1 / 2**0.5))
    assert np.isnan([other.mean["m"], other.std["m"]]).all()


def test_what_decides_on_a_grid():
    grid = [(a, b) for a in (1, 2) for b in ("x", "y", "z")]
    rows = rows_of({"a": [a for a, _ in grid], "b": [b for _, b in grid]}, [10.0 * a + (b == "x") for a, b in grid])
    effects = results.main_effects(rows, "m")
    assert list(effects) == ["a", "b"]
    assert sum(effects.values()) == pytest.approx(1.0)  # no interaction
    assert effects["b"] == pytest.approx(np.var([1, 0, 0]) / (np.var([10, 20]) + np.var([1, 0, 0])))


def test_what_decides_among_drawn_values_is_not_every_key():
    rng = np.random.default_rng(0)
    x, noise = rng.permutation(np.linspace(0, 1, 40)).tolist(), rng.uniform(size=40).tolist()
    effects = results.main_effects(rows_of({"x": x, "noise": noise, "id": [f"i{i}" for i in range(40)]}, x), "m")
    assert effects["x"] == pytest.approx(15 / 16, abs=0.01)  # what the means of four quarters explain of a line
    assert effects["noise"] < 0.3
    assert "id" not in effects
    some = [v if i % 6 else "default" for i, v in enumerate(noise)]  # a key that not all trials set
    twice = rng.permutation([i // 2 for i in range(40)]).tolist()
    texts = [f"i{max(i, 1)}" for i in range(40)]
    effects = results.main_effects(rows_of({"some": some, "twice": twice, "texts": texts}, x), "m")
    assert effects["some"] < 0.35
    assert effects["twice"] < 0.35
    assert "texts" not in effects
    assert results.main_effects(rows_of({"x": [*x[:6], x[0]]}, x[:7]), "m") == {}


def test_the_page_of_a_search_can_be_read(tmp_path):
    sweep = make([{"optim.lr": 1e-3 + i * 1.23456789e-6} for i in range(20)])
    for i, point in enumerate(sweep.points):
        folder = run.point_workdir(tmp_path, point)
        run.write_result(folder, point, status="done", step=2, metrics={"test/top1": i / 20}, secs=1.0)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "test/top1": i / 20, "train/loss": 1.0}) + "\n")
    page = write_page(tmp_path, sweep, results.collect(tmp_path, sweep)).read_text()
    (axes,) = re.findall(r"<svg[^>]*parallel coordinates.*?</svg>", page, re.DOTALL)
    assert axes.count('class="tick halo"') == 9 + 2
    legend = page[page.index('class="legend"') :]
    assert "</i>lr=0.001 " in legend
    assert "1.23456" not in legend[: legend.index("</ul>")].replace("data-points", "")
