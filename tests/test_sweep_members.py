"""Points that differ in numbers only, trained as one program: each gets what it gets alone."""

import json
import signal

import jax
import numpy as np
import pytest

from tests.helpers import csv_rows, metrics_lines, tiny_config
from vit_flax import job as job_module
from vit_flax import train_log
from vit_flax.checkpoint import Checkpoints
from vit_flax.checkpoint_record import read_record
from vit_flax.config import ConfigError
from vit_flax.evals.classification import Classification
from vit_flax.report import whole_lines
from vit_flax.signals import EXIT_PREEMPTED
from vit_flax.sweep.members import explain_single, group, program_of, train_members
from vit_flax.sweep.points import expand
from vit_flax.sweep.run import point_workdir, read_result
from vit_flax.train_log import CLOCK
from vit_flax.trainer import train
from vit_flax.workdir import lock

STEPS = 50
SWEPT = [
    {"optim.lr": 3e-3, "run.seed": 0},
    {"optim.lr": 1e-3, "run.seed": 1, "optim.weight_decay": 0.2, "model.drop_path": 0.3},
    {"optim.lr": 2e-3, "run.seed": 1, "loss.label_smoothing": 0.2, "augment.mixup_alpha": 0.7},
    {"optim.lr": 2e-3, "run.seed": 2, "optim.clip_norm": 0.3, "run.ema_decay": 0.5},
]


def base(**overrides):
    config = tiny_config(
        run__total_steps=STEPS,
        run__ema_decay=0.9,
        run__data_seed=0,
        run__log_every_steps=10,
        augment__mixup_alpha=0.3,
        checkpoint__every_steps=20,
        **overrides,
    )
    config.evals.test.every_steps = 25
    return config.lock()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The points of SWEPT, trained side by side on two devices."""
    workdir = tmp_path_factory.mktemp("members")
    points = expand(base(), SWEPT, where="test")
    train_members(points, workdir, say=lambda line: None)
    return points, workdir


@pytest.mark.parametrize("i", [0, 3])
def test_a_member_gets_what_it_gets_alone(trained, i, tmp_path):
    points, workdir = trained
    state, results = train(points[i].config, tmp_path)
    folder = point_workdir(workdir, points[i])
    assert {path.name for path in folder.iterdir()} - {"result.json"} == {path.name for path in tmp_path.iterdir()}
    assert (folder / "tensorboard" / "hparams").is_dir()
    again, same = train(points[i].config, folder)  # done already: restores what the group has left
    assert int(again.step) == STEPS
    for (path, ours), alone in zip(
        jax.tree_util.tree_leaves_with_path((again.params, again.ema)), jax.tree.leaves((state.params, state.ema))
    ):
        name = jax.tree_util.keystr(path)
        if (
            "['key']['bias']" not in name
        ):  # a softmax does not see it: its gradient is rounding noise, and Adam scales it
            np.testing.assert_allclose(ours, alone, atol=2e-5, rtol=1e-4, err_msg=name)
    assert same["test/loss"] == pytest.approx(results["test/loss"], rel=1e-4)
    ours, alone = ([json.loads(line) for line in metrics_lines(folder)] for folder in (folder, tmp_path))
    assert [(line["step"], sorted(line)) for line in ours] == [(line["step"], sorted(line)) for line in alone]
    for a, b in zip(ours, alone):
        if "train/loss" in a:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


def test_members_differ(trained):
    points, workdir = trained
    losses = [read_result(point_workdir(workdir, point))["metrics"]["train/loss"] for point in points]
    assert len({round(loss, 4) for loss in losses}) == len(points)


def test_points_that_differ_in_more_than_numbers_are_several_programs(tmp_path):
    points = expand(base(), [{"optim.lr": lr, "model.width": w} for lr in (1e-3, 2e-3) for w in (8, 16)], where="test")
    assert [[p.index for p in members] for members in group(points)] == [[0, 2], [1, 3]]
    assert [len(members) for members in group(points[::2], max_members=1)] == [1, 1]
    with pytest.raises(ConfigError, match="more than numbers"):
        train_members(points[:2], tmp_path)
    # What is off is not in the program.
    off = expand(base(), [{"augment.mixup_alpha": 0.0}, {"augment.mixup_alpha": 0.2}], where="test")
    assert program_of(off[0].config) != program_of(off[1].config)


def test_seeds_are_members_with_a_data_seed_only():
    seeds = [{"run.seed": 0}, {"run.seed": 1}]
    points = expand(base(), seeds, where="test")
    assert explain_single(points) is None
    assert len(group(points)) == 1
    alone = expand(base(run__seed=5), [{**seed, "run.data_seed": 1} for seed in seeds], where="test")
    assert len(group(alone)) == 1


def test_a_member_that_diverges_is_noted_and_the_others_go_on(tmp_path):
    config = base(run__max_skipped_steps=3)
    with config.unlocked():
        config.run.total_steps = 20
        config.optim.warmup_steps = 0
    points = expand(config, [{"optim.lr": 1e-3}, {"optim.lr": 1e38}], where="test")
    said = []
    train_members(points, tmp_path, say=said.append)
    good, bad = (read_result(point_workdir(tmp_path, point)) for point in points)
    assert good["status"] == "done"
    assert bad["status"] == "failed"
    assert "3 steps in a row" in bad["error"]
    assert any("the others go on" in line for line in said)


def test_a_member_tried_again_beside_a_new_one_is_another_group(tmp_path):
    """As many members, the first one the same: only their names tell the groups apart."""
    config = base()
    with config.unlocked():
        config.run.total_steps = 2
        config.optim.warmup_steps = 0
    for other in (2e-3, 3e-3):
        points = expand(config, [{"optim.lr": 1e-3}, {"optim.lr": other}], where="test")
        train_members(points, tmp_path, say=lambda line: None)
        assert read_result(point_workdir(tmp_path, points[1]))["status"] == "done"
    assert len([*(tmp_path / "groups").iterdir()]) == 2


def test_a_group_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    """Cut at step 30, between its checkpoints of step 20 and 40."""
    from vit_flax.job import Job

    points, workdir = trained
    whole = Job.host_batches

    class Stopped(Exception):
        pass

    def cut(self, start):
        for number, batch in enumerate(whole(self, start)):
            if number == 30:
                raise Stopped
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Job, "host_batches", cut)
        with pytest.raises(Stopped):
            train_members(points, tmp_path, say=lambda line: None)
    train_members(points, tmp_path, say=lambda line: None)
    for point in points:
        mine, theirs = (read_result(point_workdir(folder, point))["metrics"] for folder in (tmp_path, workdir))
        assert mine["test/loss"] == theirs["test/loss"]
        assert metrics_lines(point_workdir(tmp_path, point)) == metrics_lines(point_workdir(workdir, point))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two points of four steps with one evaluation, after the last; undisturbed."""
    config = base()
    with config.unlocked():
        config.run.total_steps = 4
    points, workdir = expand(config, SWEPT[:2], where="test"), tmp_path_factory.mktemp("short")
    train_members(points, workdir, say=lambda line: None)
    return points, workdir


@pytest.mark.parametrize("batch", [14, 24])
def test_a_signal_while_members_are_evaluated_costs_no_result(batch, short, tmp_path, monkeypatch):
    """In the second member or at the very end: of 12 batches each, half of them for the average."""
    points, workdir = short
    whole = job_module.Data.eval

    class Signalled:
        def __init__(self, batches):
            self.batches, self.count = batches, 0

        def __iter__(self):
            for each in self.batches:
                yield each
                self.count += 1
                if self.count == batch:
                    signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(job_module.Data, "eval", lambda self, **arguments: Signalled(whole(self, **arguments)))
        with pytest.raises(SystemExit) as left:
            train_members(points, tmp_path, say=lambda line: None)
    assert left.value.code == EXIT_PREEMPTED
    assert (batch == 24) == (read_result(point_workdir(tmp_path, points[0])) is not None)
    train_members(points, tmp_path, say=lambda line: None)
    for point in points:
        mine, theirs = (point_workdir(folder, point) for folder in (tmp_path, workdir))
        assert read_result(mine)["metrics"]["test/loss"] == read_result(theirs)["metrics"]["test/loss"]
        assert metrics_lines(mine) == metrics_lines(theirs)
        assert csv_rows(mine, "test") == csv_rows(theirs, "test")


def test_a_kill_while_results_are_written_costs_none_of_them(short, tmp_path, monkeypatch):
    """After the checkpoint of the first member; the second life trains and evaluates nothing."""
    points, workdir = short
    whole = Checkpoints.save

    def cut(self, *arguments, **named):
        if self.directory.parent == point_workdir(tmp_path, points[1]):
            raise KeyboardInterrupt
        return whole(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            train_members(points, tmp_path, say=lambda line: None)
    assert not any(read_result(point_workdir(tmp_path, point)) for point in points)
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "run", lambda *_: pytest.fail("evaluated again"))
        patch.setattr(job_module.Data, "train", lambda *_, **__: pytest.fail("trained again"))
        train_members(points, tmp_path, say=lambda line: None)
    for point in points:
        mine, theirs = (point_workdir(folder, point) for folder in (tmp_path, workdir))
        assert same_numbers(read_result(mine)["metrics"], read_result(theirs)["metrics"])
        assert metrics_lines(mine) == metrics_lines(theirs)
        records = [read_record(folder / "checkpoints" / "4") for folder in (mine, theirs)]
        assert records[0]["metrics"] == records[1]["metrics"] != {}
        assert records[0]["checksums"] == records[1]["checksums"]


def same_numbers(a, b):
    return {k: v for k, v in a.items() if k not in CLOCK} == {k: v for k, v in b.items() if k not in CLOCK}


def test_evaluations_and_checkpoints_by_the_clock(tmp_path):
    config = base()
    with config.unlocked():
        config.run.total_steps = 4
        del config.evals.test["every_steps"]
        config.evals.test.every_secs = 1e-9
    points = expand(config, SWEPT[:2], where="test")
    train_members(points, tmp_path, say=lambda line: None)
    for point in points:
        assert [row["step"] for row in csv_rows(point_workdir(tmp_path, point), "test")] == ["1", "2", "3", "4"]


def test_no_evaluation_counts_in_the_throughput_of_any_member(tmp_path, monkeypatch):
    """A batch takes a second, an evaluation 100."""
    now = [0.0]
    batches, evaluate = job_module.Job.host_batches, Classification.run

    def slow_batches(self, start_step):
        for batch in batches(self, start_step):
            now[0] += 1.0
            yield batch

    def slow_evaluation(self, state):
        now[0] += 100.0
        return evaluate(self, state)

    monkeypatch.setattr(job_module.Job, "host_batches", slow_batches)
    monkeypatch.setattr(Classification, "run", slow_evaluation)
    monkeypatch.setattr(train_log.time, "perf_counter", lambda: now[0])
    config = base()
    with config.unlocked():
        config.run.total_steps, config.run.log_every_steps, config.evals.test.every_steps = 9, 3, 2
    points = expand(config, SWEPT[:2], where="test")
    train_members(points, tmp_path, say=lambda line: None)
    for point in points:
        lines = whole_lines(point_workdir(tmp_path, point) / "metrics.jsonl")
        rates = [line["train/images_per_sec"] / 64 for line in lines if "train/loss" in line]
        assert rates == [1.5, 1.0, 1.0]  # the clock starts after the first step, which is compiled


def test_a_member_that_is_running_by_itself_is_left_alone(short, tmp_path):
    points, _ = short
    with lock(point_workdir(tmp_path, points[1])), pytest.raises(RuntimeError, match="is in use by process"):
        train_members(points, tmp_path, say=lambda line: None)
