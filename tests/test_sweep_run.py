"""Points in processes of their own: what ends well, what does not, and what is told to stop."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import tiny_config
from vit_flax.config import ConfigError
from vit_flax.sweep import run
from vit_flax.sweep.points import expand
from vit_flax.workdir import InUse, lock

submitit = pytest.importorskip("submitit")

ROOT = Path(__file__).parent.parent


def make_points(count):
    return expand(tiny_config().lock(), [{"run.seed": seed} for seed in range(count)], where="test")


@pytest.fixture
def processes(monkeypatch):
    """Replaces the training in the processes by `train(task, workdir) -> status`, which must import what it needs."""

    def replace(train):
        class Pretends(run._RunTask):  # of a function: pickled whole, so that the processes need not import this file
            def _train(self, task, workdir):
                return train(task, workdir)

        monkeypatch.setattr(run, "_run_task", Pretends())

    # A process that has died leaves no result; submitit waits for slow file systems.
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    return replace


def start(points, workdir, jobs=2, **options):
    """Runs the points that are not done; returns what was said."""
    said = []
    plan = run.Each(points, workdir)
    run.run(plan, workdir, jobs=jobs, launcher="local", launcher_options=options, say=said.append)
    return plan, said


def test_points_run_at_once_and_each_end_is_noted(tmp_path, processes):
    def train(task, workdir):
        import os
        import signal
        import time

        from vit_flax.sweep.run import point_workdir, write_result

        index = task.point.index
        folder = point_workdir(workdir, task.point)
        (workdir / f"here{index}").touch()
        deadline = time.time() + 120
        while index < 2 and not (workdir / f"here{1 - index}").exists():  # the first two wait for each other
            assert time.time() < deadline
            time.sleep(0.05)
        if index == 1:
            return write_result(folder, task.point, status="failed", error="Diverged: x", secs=1.0)["status"]
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3:
            raise ImportError("no such package")
        metrics = {"a": 1.0, "test/count": 359.0, "train/loss": 1.0}
        return write_result(folder, task.point, status="done", step=10, metrics=metrics, secs=1.0)["status"]

    processes(train)
    points = make_points(5)
    plan, said = start(points, tmp_path)
    results = [run.read_result(run.point_workdir(tmp_path, point)) for point in points]
    assert [result["status"] for result in results] == ["done", "failed", "failed", "failed", "done"]
    assert results[2]["error"].startswith("the process died")
    assert "no such package" in results[3]["error"]
    assert sorted(line[:5] for line in said) == [f"[{n}/5]" for n in range(1, 6)]
    assert sum("FAILED" in line for line in said) == 3
    assert sum(line.endswith(": a 1.0000  (1 s)") for line in said) == 2
    assert not plan.finished

    def succeed(task, workdir):
        from vit_flax.sweep.run import point_workdir, write_result

        folder = point_workdir(workdir, task.point)
        return write_result(folder, task.point, status="done", step=10, metrics={"a": 2.0}, secs=1.0)["status"]

    processes(succeed)  # started again: what failed is tried again, and nothing else
    plan, said = start(points, tmp_path)
    assert plan.finished
    assert len(said) == 3
    assert [run.read_result(run.point_workdir(tmp_path, point))["metrics"]["a"] for point in points] == [1, 2, 2, 2, 1]


def wait_for_a_signal(task, workdir):
    import time

    index = task.point.index
    (workdir / f"here{index}").touch()
    deadline = time.time() + 120
    try:
        while time.time() < deadline:
            time.sleep(0.05)
    except SystemExit:
        time.sleep(1.5)  # longer than submitit gives a job that it cancels
        (workdir / f"saved{index}").touch()
        raise
    raise AssertionError("no signal came")


def test_an_interrupted_sweep_lets_its_processes_save_and_leaves_none_behind(tmp_path, processes, monkeypatch):
    processes(wait_for_a_signal)

    def interrupt_once_both_are_there(secs):
        if {"here0", "here1"} <= set(os.listdir(tmp_path)):
            monkeypatch.setattr(run, "time", time)
            raise KeyboardInterrupt
        time.sleep(secs)

    monkeypatch.setattr(run, "time", SimpleNamespace(sleep=interrupt_once_both_are_there))
    points = make_points(3)
    with pytest.raises(KeyboardInterrupt):
        start(points, tmp_path)
    assert {"saved0", "saved1"} <= set(os.listdir(tmp_path))
    assert "here2" not in os.listdir(tmp_path)
    assert not any((tmp_path / "points").glob("*/result.json"))


def test_a_point_that_runs_elsewhere_is_left_alone(tmp_path, monkeypatch):
    """By a process that outlived the command which had started it: it has not failed, and notes its own result."""
    (point,) = make_points(1)
    monkeypatch.setattr("vit_flax.cache.enable_compilation_cache", lambda: None)
    with lock(run.point_workdir(tmp_path, point)):
        assert run._run_task._train(run.Task(point), tmp_path) is None
        with pytest.raises(InUse):
            run.run_point(point, tmp_path)
    assert run.read_result(run.point_workdir(tmp_path, point)) is None


def test_a_clock_that_is_set_back_makes_no_negative_times(tmp_path, monkeypatch):
    def train(*_, **__):
        raise ValueError

    monkeypatch.setattr("vit_flax.trainer.train", train)
    monkeypatch.setattr(run.time, "time", itertools.count(1e9, -3600).__next__)
    assert run.run_point(make_points(1)[0], tmp_path)["secs"] >= 0


def test_a_process_that_is_told_to_stop_by_somebody_else_has_not_failed(tmp_path, processes):
    def train(task, workdir):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)

    processes(train)
    plan, said = start(make_points(1), tmp_path)
    assert "stopped, or in use by another process; the same command goes on" in said[0]
    assert run.read_result(run.point_workdir(tmp_path, plan.points[0])) is None


def test_when_the_time_of_a_job_is_up_it_saves_and_starts_again(tmp_path, processes):
    def train(task, workdir):
        import os
        import signal
        import time

        from vit_flax.sweep.run import point_workdir, write_result

        if (workdir / "saved").exists():
            folder = point_workdir(workdir, task.point)
            return write_result(folder, task.point, status="done", step=10, metrics={}, secs=1.0)["status"]
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(60)
        except SystemExit:
            (workdir / "saved").touch()
            raise

    processes(train)
    plan, _ = start(make_points(1), tmp_path)
    assert plan.finished


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_every_point_and_the_same_command_goes_on(tmp_path):
    """The signal goes to the whole group, as a terminal sends it; trained for real."""
    (tmp_path / "base.py").write_text(
        "from tests.helpers import tiny_config\n"
        "def get_config():\n"
        "    config = tiny_config(run__total_steps=1000, checkpoint__every_steps=0, checkpoint__best_metric=None)\n"
        "    config.evals.test.every_steps = 0\n"
        "    return config\n"
    )
    (tmp_path / "sweep.py").write_text(
        f"BASE = {str(tmp_path / 'base.py')!r}\n"
        "def sweep():\n    for seed in (0, 1): yield {'run.seed': seed}\n"
        "def metrics(): return ['test/top1']\n"
    )
    command = [sys.executable, "-m", "vit_flax.sweep", "--sweep", str(tmp_path / "sweep.py"), "--jobs", "2"]
    command += ["--workdir", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    metrics = [tmp_path / "run" / "points" / f"seed={seed}" / "metrics.jsonl" for seed in (0, 1)]
    while not all(file.exists() and file.read_text() for file in metrics):
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait() == 75
    for file in metrics:
        saved = [int(folder.name) for folder in (file.parent / "checkpoints").iterdir() if folder.name.isdigit()]
        assert len(saved) == 1
        assert 0 < saved[0] < 1000
        assert not (file.parent / "result.json").exists()
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    for file in metrics:
        result = json.loads((file.parent / "result.json").read_text())
        assert (result["status"], result["step"]) == ("done", 1000)


@pytest.mark.parametrize(("visible", "pairs"), [(None, {"0,1", "2,3"}), ("7,5,3,1", {"7,5", "3,1"})])
def test_processes_at_once_have_gpus_of_their_own(visible, pairs, tmp_path, processes, monkeypatch):
    pretend_gpus(4, tmp_path, monkeypatch)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def train(task, workdir):
        import os
        import time

        from vit_flax.sweep.run import point_workdir, write_result

        index, seen = task.point.index, os.environ["CUDA_VISIBLE_DEVICES"]
        (workdir / f"here{index}").touch()
        deadline = time.time() + 120
        while index < 2 and not (workdir / f"here{1 - index}").exists():  # the first two run at once
            assert time.time() < deadline
            time.sleep(0.05)
        return write_result(
            point_workdir(workdir, task.point), task.point, status="done", metrics={}, secs=0, gpus=seen
        )["status"]

    processes(train)
    points = make_points(4)
    start(points, tmp_path, jobs=2, gpus_per_node=2)
    seen = [run.read_result(run.point_workdir(tmp_path, point))["gpus"] for point in points]
    assert {*seen[:2]} == pairs
    assert {*seen} == pairs


def test_more_gpus_than_there_are(tmp_path, monkeypatch):
    for visible in ("0,1,2", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(
            ConfigError, match=f"2 jobs with gpus_per_node=2 need 4 GPUs, and CUDA_VISIBLE_DEVICES={visible}"
        ):
            start(make_points(1), tmp_path, jobs=2, gpus_per_node=2)
    pretend_gpus(3, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="2 jobs with gpus_per_node=2 need 4 GPUs, and this machine has 3"):
        start(make_points(1), tmp_path, jobs=2, gpus_per_node=2)


def pretend_gpus(count, folder, monkeypatch):
    """As on a machine with so many GPUs, the first of them cut in two, where CUDA_VISIBLE_DEVICES is not set."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = "\n".join(["GPU 0: A (UUID: 0)", "  MIG 1g.5gb", "  MIG 1g.5gb"] + [f"GPU {i}: A" for i in range(1, count)])
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat << END\n{lines}\nEND\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gpus_per_node": "2"}, "gpus_per_node='2', expected a number"), ({"foo": 1}, '{"foo": 1}: Parameter')],
)
def test_launcher_options_that_are_wrong(tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        start(make_points(1), tmp_path, jobs=1, **options)
