"""A search with Optuna: what it asks depends on its seed and on the results, not on where it was interrupted."""

import math
from pathlib import Path

import pytest

from tests.helpers import tiny_config
from vit_flax.config import ConfigError
from vit_flax.sweep import results
from vit_flax.sweep.points import Sweep
from vit_flax.sweep.run import point_workdir, read_result, run_point, write_result
from vit_flax.sweep.trials import Trials

pytest.importorskip("optuna")


def suggest(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return {"optim.lr": lr, "optim.weight_decay": lr * trial.suggest_categorical("decay", [0.1, 1.0])}


def make(suggest=suggest, metrics=("test/top1",)):
    base = tiny_config(run__total_steps=4, checkpoint__every_steps=5).lock()
    return Sweep(Path("sweep.py"), "", base, (), metrics, suggest)


def good(point):
    """Best at a learning rate of 1e-2."""
    return 1 - abs(math.log10(point.config["optim"]["lr"]) + 2)


def pretend(task, workdir, value):
    """Writes the result that training would have had; an error where the value is None."""
    folder, found = point_workdir(workdir, task.point), value(task.point)
    if found is None:
        return write_result(folder, task.point, status="failed", error="Diverged", secs=1.0)
    return write_result(folder, task.point, status="done", step=4, metrics={"test/top1": found}, secs=1.0)


def play(trials, workdir, value=good, count=math.inf):
    """One job at a time; the names of the points that were trained."""
    names = []
    while len(names) < count and (task := trials.next()) is not None:
        trials.ended(task, pretend(task, workdir, value))
        names.append(task.point.name)
    return names


def study(trials):
    """Numbers, states, parameters and values of the trials."""
    return [(t.number, t.state.name, t.params, t.value) for t in trials._study.trials]


def test_a_search_is_repeatable_and_a_seed_makes_another(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        trials = Trials(make(), tmp_path / name, count=14, seed=seed)
        runs.append(play(trials, tmp_path / name))
        assert trials.finished
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 14
    assert not set(runs[0]) & set(runs[2])


@pytest.mark.parametrize("kill_after", [0, 3, 12])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, kill_after):
    """Killed while a trial runs: before its result, and between its result and the study."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = Trials(make(), tmp_path / "whole", count=14, seed=3)
    play(whole, tmp_path / "whole")
    played = play(Trials(make(), tmp_path / "cut", count=14, seed=3), tmp_path / "cut", count=kill_after)
    interrupted = Trials(make(), tmp_path / "cut", count=14, seed=3).next()
    again = Trials(make(), tmp_path / "cut", count=14, seed=3)
    task = again.next()
    assert task.point == interrupted.point
    pretend(task, tmp_path / "cut", good)
    last = Trials(make(), tmp_path / "cut", count=14, seed=3)
    assert not last.finished
    played += [task.point.name, *play(last, tmp_path / "cut")]
    assert study(last) == study(whole)
    assert played == [point.name for point in whole.points]
    assert last.points == whole.points


def test_more_trials_can_be_asked_for_later(tmp_path):
    first = play(Trials(make(), tmp_path, count=3, seed=0), tmp_path)
    trials = Trials(make(), tmp_path, count=5, seed=0)
    more = play(trials, tmp_path)
    assert (len(first), len(more)) == (3, 2)
    assert [point.name for point in trials.points] == first + more
    assert play(Trials(make(), tmp_path, count=5, seed=0), tmp_path) == []


def test_trials_that_fail_or_diverge_count_and_are_not_tried_again(tmp_path):
    values = iter([None, math.nan, 0.5])
    trials = Trials(make(), tmp_path, count=3, seed=0)
    assert len(play(trials, tmp_path, lambda point: next(values))) == 3
    assert [state for _, state, _, _ in study(trials)] == ["FAIL", "FAIL", "COMPLETE"]
    again = Trials(make(), tmp_path, count=3, seed=0)
    assert again.finished
    assert again.next() is None


def test_a_metric_may_be_better_when_it_is_smaller(tmp_path):
    trials = Trials(make(metrics=("-test/top1",)), tmp_path, count=2, seed=0)
    play(trials, tmp_path)
    best = trials._study.best_trial.number
    tops = [read_result(point_workdir(tmp_path, point))["metrics"]["test/top1"] for point in trials.points]
    assert tops[best] == min(tops)


def two_rates(trial):
    return {"optim.lr": trial.suggest_categorical("lr", [1e-3, 2e-3])}


def test_a_point_that_is_asked_for_again_is_not_trained_again(tmp_path):
    """With two points to choose from, also while the first one is running."""
    trials = Trials(make(two_rates), tmp_path, count=6, seed=0)
    running = []
    while (task := trials.next()) is not None:
        running.append(task)
    names = [task.point.name for task in running]
    assert len(names) == len(set(names)) <= 2
    for task in running:
        trials.ended(task, pretend(task, tmp_path, good))
    names += play(trials, tmp_path)
    assert sorted(names) == ["base", "lr=0.001"]
    assert len(study(trials)) == 6


def test_half_a_line_of_the_journal_costs_no_trial(tmp_path):
    """As a full disk leaves it."""
    play(Trials(make(), tmp_path, count=2, seed=0), tmp_path)
    with open(tmp_path / "optuna.journal", "a") as journal:
        journal.write('{"op_code": 8, "work')
    assert len(play(Trials(make(), tmp_path, count=3, seed=0), tmp_path)) == 1
    assert len(study(Trials(make(), tmp_path, count=3, seed=0))) == 3


def test_an_interrupted_trial_stays_open(tmp_path):
    trials = Trials(make(), tmp_path, count=1, seed=0)
    trials.ended(trials.next(), None)
    assert trials.next() is None
    assert not trials.finished


def test_what_suggest_does_wrong_is_named(tmp_path):
    def unknown(trial):
        return {"optm.lr": 1.0}

    def broken(trial):
        return {"optim.lr": 1 / 0}

    with pytest.raises(ConfigError, match=r"suggest\(trial\) for trial 0: the base has no key 'optm.lr'"):
        Trials(make(unknown), None, count=1, seed=0).next()
    with pytest.raises(ConfigError, match="for trial 0: ZeroDivisionError"):
        Trials(make(broken), None, count=1, seed=0).next()
    trials = Trials(make(metrics=("test/top5",)), tmp_path, count=2, seed=0)
    with pytest.raises(ConfigError, match=r"'test/top5' decides, and the results do not have it: test/top1"):
        play(trials, tmp_path)


def test_a_trial_is_a_point_like_any_other(tmp_path):
    """Trained for real."""
    sweep = make()
    trials = Trials(sweep, tmp_path, count=1, seed=0)
    task = trials.next()
    label = trials.ended(task, run_point(task.point, tmp_path))
    assert label == "[trial 1/1]"
    assert (point_workdir(tmp_path, task.point) / "report.html").exists()
    swept = Sweep(sweep.path, "", sweep.base, trials.points, sweep.metrics)
    (row,) = results.collect(tmp_path, swept)
    assert (row.status, row.step) == ("done", 4)
    assert study(trials)[0][3] == row.metrics["test/top1"]
