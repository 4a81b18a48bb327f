"""The whole path: train, evaluate, checkpoint, resume; and what happens when something is wrong."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import Cut, metrics_lines, tiny_config
from vit_flax.config import ConfigError
from vit_flax.job import build
from vit_flax.sinks.files import Files
from vit_flax.trainer import evaluate, train

ROOT = Path(__file__).parent.parent


def raw(state):
    """Bits of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    unkeyed = (
        (p, jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for p, x in leaves
    )
    return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in unkeyed}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: state, results, workdir."""
    workdir = tmp_path_factory.mktemp("straight")
    config = tiny_config(run__ema_decay=0.9)
    state, results = train(config, workdir)
    return state, results, workdir


def test_run_writes_everything_it_promises(finished):
    state, results, workdir = finished
    assert int(state.step) == 10
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["model"]["width"] == 8
    assert record["versions"]["jax"] == jax.__version__
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "train/loss" in x] == [2, 4, 6, 8, 10]
    assert [x["step"] for x in lines if "test/top1" in x] == [5, 10]
    assert [x["test/count"] for x in lines if "test/count" in x] == [
        359,
        359,
    ]  # 359 = 5 * 64 + 39: each example once, padding not counted
    assert list((workdir / "tensorboard").iterdir())
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()} >= {8, 10}
    assert {"test/top1", "test/ema_top1", "train/loss"} <= results.keys()


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors sees it."""


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch):
    """Ends a run at step 7, between the checkpoint of step 4 and that of step 8, and starts the same command again."""
    config = tiny_config(run__ema_decay=0.9)
    from vit_flax import job

    whole = job.Job.train_batches

    monkeypatch.setattr(job.Job, "train_batches", lambda self, start: Cut(whole(self, start), 7, Killed))
    with pytest.raises(Killed):
        train(config, tmp_path)
    monkeypatch.undo()
    state, _ = train(config, tmp_path)
    assert raw(state) == raw(finished[0])
    assert metrics_lines(tmp_path) == metrics_lines(finished[2])


@pytest.mark.parametrize(("step", "name"), [(6, "train/loss"), (5, "test/top1")])
def test_a_line_that_could_not_be_written_is_written_by_the_next_life(step, name, finished, tmp_path, monkeypatch):
    """The disk is full for the metrics, but not for the checkpoint."""
    whole = Files.scalars

    def full(self, at, values):
        if at == step and name in values:
            raise OSError(28, "No space left on device")
        whole(self, at, values)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "scalars", full)
        with pytest.raises(OSError, match="No space left"):
            train(tiny_config(run__ema_decay=0.9), tmp_path)
    train(tiny_config(run__ema_decay=0.9), tmp_path)
    assert metrics_lines(tmp_path) == metrics_lines(finished[2])


def test_running_a_finished_job_again_changes_nothing(finished):
    state, results, workdir = finished
    before = metrics_lines(workdir)
    again, same = train(tiny_config(run__ema_decay=0.9), workdir)
    assert raw(again) == raw(state)
    assert same == results
    assert metrics_lines(workdir) == before


def test_evaluate_gives_the_metrics_of_the_last_checkpoint(finished):
    _, results, workdir = finished
    again = evaluate(tiny_config(run__ema_decay=0.9), workdir)
    assert again == {k: v for k, v in results.items() if k.startswith("test/")}


def test_evaluate_says_the_step_of_the_checkpoint(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[2], tmp_path / "unfinished")
    shutil.rmtree(workdir / "checkpoints" / "10")
    evaluate(tiny_config(run__ema_decay=0.9), workdir)
    said = capsys.readouterr().out
    assert ("step 8 test/" in said, "step 10 " in said) == (True, False)


def other_evaluation():
    config = tiny_config(run__ema_decay=0.9, data__eval_split="test[:100]", data__eval_batch_size=40)
    config.data.eval_transforms = [*config.data.eval_transforms, dict(op="resize", size_px=8)]
    config.evals.test.split = "test[:100]"
    config.evals.new = dict(type="classification", every_steps=0, split="train[:9]")  # new figures: nothing to compare
    return config


def test_a_finished_run_is_evaluated_on_something_else(finished):
    assert evaluate(other_evaluation(), finished[2])["test/count"] == 100


def test_a_run_may_go_on_with_another_evaluation_and_says_so(finished, tmp_path, caplog):
    train(tiny_config(run__ema_decay=0.9), tmp_path, stop_after=4)
    assert "another evaluation" not in caplog.text
    state, results = train(other_evaluation(), tmp_path)
    assert "goes on with another evaluation (data.eval_split test -> test[:100], data.eval_transforms" in caplog.text
    assert "evals.test.split data.eval_split -> test[:100])" in caplog.text
    assert "evals.new" not in caplog.text
    assert results["test/count"] == 100
    assert raw(state) == raw(finished[0])


def test_another_experiment_in_the_workdir_is_refused(finished):
    workdir = finished[2]
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}
    with pytest.raises(ConfigError, match=r"model\.width: there 8, here 16"):
        train(tiny_config(run__ema_decay=0.9, model__width=16), workdir)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # What changes neither parameters nor data may differ.
    train(tiny_config(run__ema_decay=0.9, run__log_every_steps=5), workdir)


def test_a_run_that_failed_before_its_first_step_does_not_keep_the_workdir(tmp_path, monkeypatch):
    from vit_flax import job

    whole = job.Job.train_batches
    with monkeypatch.context() as patched:
        patched.setattr(job.Job, "train_batches", lambda self, start: Cut(whole(self, start), 0, ValueError("torn")))
        with pytest.raises(ValueError, match="torn"):
            train(tiny_config(), tmp_path)
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["0"]
    state, _ = train(tiny_config(model__width=16, run__total_steps=4), tmp_path)
    assert int(state.step) == 4
    assert (tmp_path / "checkpoints" / "replaced" / "0").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model.update(dict(widht=3)), r"unknown key model\.widht: did you mean model\.width\?"),
        (lambda c: c.update(dict(modle=dict(a=1))), r"unknown key modle: did you mean model\?"),
        (lambda c: c.optim.update(dict(weigth_decay=1.0)), r"optim\.weigth_decay"),
        (lambda c: c.augment.update(dict(mixup=0.2)), r"unknown key augment\.mixup"),
        (lambda c: c.evals.test.update(dict(evry_steps=3)), r"unknown key evals\.test\.evry_steps"),
        (lambda c: c.data.source.update(dict(nam="x")), "nam"),
        (lambda c: c.run.update(dict(total_epochs=3)), "both total_epochs and total_steps"),
        (lambda c: c.model.update(dict(num_classes=7)), r"model\.num_classes=7, but the data has 10"),
        (lambda c: c.model.update(dict(patch_size=3)), "patch size 3x3 does not divide the image size 8x8"),
        (lambda c: c.model.update(dict(pool="max")), r"model\.pool='max' is unknown"),
        (lambda c: c.model.update(dict(num_heads=3)), r"model\.num_heads=3 must divide model\.width=8"),
        (lambda c: c.loss.update(dict(name="mse")), r"loss\.name='mse' is unknown"),
        (lambda c: c.data.source.update(dict(name="nothing")), "nothing"),
        (lambda c: c.data.update(dict(batch_size=5000)), "5000"),
        (lambda c: c.__delitem__("loss"), "missing key loss"),
        (lambda c: c.optim.__delitem__("lr"), r"missing key optim\.lr"),
    ],
)
def test_bad_configs_are_named_before_anything_starts(change, message, tmp_path):
    config = tiny_config()
    with config.unlocked():
        change(config)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_wrong_type_in_the_file_is_named():
    config = tiny_config().to_dict()
    config["model"]["width"] = "8"
    with pytest.raises(ConfigError, match=r"model\.width: expected int, found '8' \(str\)"):
        build(config)


def test_a_run_stopped_after_a_step_ends_as_an_uninterrupted_one(finished, tmp_path):
    """Steps 3 and 7: nothing is logged, evaluated or saved there otherwise, and the schedule ends at step 10."""
    config = tiny_config(run__ema_decay=0.9)
    for step in (3, 7):
        state, results = train(config, tmp_path, stop_after=step)
        assert int(state.step) == step
        assert "test/top1" in results
        assert train(config, tmp_path, stop_after=step)[1]["test/loss"] == results["test/loss"]  # kept, not repeated
    assert not (tmp_path / "tensorboard" / "hparams").exists()  # the end of a run writes it
    state, results = train(config, tmp_path)
    expected, expected_results, workdir = finished
    assert raw(state) == raw(expected)
    assert (tmp_path / "tensorboard" / "hparams").exists()
    assert {k: v for k, v in results.items() if k.startswith("test/")} == {
        k: v for k, v in expected_results.items() if k.startswith("test/")
    }
    at_stops = [line for line in metrics_lines(tmp_path) if json.loads(line)["step"] in (3, 7)]
    assert [sorted(json.loads(line)) for line in at_stops] == [sorted(json.loads(at_stops[0]))] * 2
    assert [line for line in metrics_lines(tmp_path) if line not in at_stops] == metrics_lines(workdir)


def test_a_stop_before_the_first_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stop_after=0"):
        train(tiny_config(), tmp_path / "run", stop_after=0)
    assert not (tmp_path / "run").exists()
