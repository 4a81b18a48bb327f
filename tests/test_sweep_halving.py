"""Successive halving: who goes on, in which order, after a kill, and that going on changes nothing."""

import json
import math

import jax
import numpy as np
import pytest

from tests.helpers import tiny_config
from vit_flax.config import ConfigError
from vit_flax.sweep.halving import Halving, rungs_of
from vit_flax.sweep.points import expand
from vit_flax.sweep.run import point_workdir, read_result, run_point, write_result
from vit_flax.trainer import train

RUNGS = [3, 9, 27]


def make_points(count):
    base = tiny_config(run__total_steps=27, checkpoint__every_steps=30, run__data_seed=0).lock()
    return expand(base, [{"run.seed": seed} for seed in range(count)], where="test")


def make(points, workdir, *, asynchronous=False, deciding=("test/top1", True)):
    return Halving(points, workdir, rungs=RUNGS, factor=3, deciding=deciding, asynchronous=asynchronous)


def pretend(task, workdir, value):
    """Writes the result that training would have had: `value(index, step)`, an error where that is None."""
    step = task.stop_after or RUNGS[-1]
    folder = point_workdir(workdir, task.point)
    rungs = (read_result(folder) or {}).get("rungs", {})
    found = value(task.point.index, step)
    if found is None:
        return write_result(folder, task.point, status="failed", error="Diverged", secs=1.0, rungs=rungs)
    metrics = {"test/top1": found}
    status = "stopped" if task.stop_after else "done"
    rungs = rungs | ({str(step): metrics} if task.stop_after else {})
    return write_result(folder, task.point, status=status, step=step, metrics=metrics, secs=1.0, rungs=rungs)


def play(plan, workdir, value, tasks=math.inf):
    """One job at a time; the tasks, as (index, step), until the plan has no more or there were so many."""
    played = []
    while len(played) < tasks and (task := plan.next()) is not None:
        plan.ended(task, pretend(task, workdir, value))
        played.append((task.point.index, task.stop_after or RUNGS[-1]))
    return played


def good(index, step):
    """Point 4 is the best, then 5, 3, 6, 2, ..."""
    return 1 - abs(index - 4.1) / 10 + step / 1000


def test_rungs_end_with_the_whole_run():
    assert rungs_of([27, 27], 3, 3) == [3, 9, 27]
    assert rungs_of([100], 3, None) == [11, 33, 100]
    assert rungs_of([100], 2, 20) == [25, 50, 100]
    assert rungs_of([9], 3, None) == [1, 3, 9]
    with pytest.raises(ConfigError, match=r"these have 10 to 20: give all of them the same run\.total_steps"):
        rungs_of([10, 20], 3, None)
    with pytest.raises(ConfigError, match=r"--min_steps=11: expected 1 to 10"):
        rungs_of([30], 3, 11)
    with pytest.raises(ConfigError, match="--halving_factor=1"):
        rungs_of([30], 1, 11)


def test_with_one_job_a_rung_is_complete_before_its_best_go_on(tmp_path):
    plan = make(make_points(10), tmp_path)
    assert not plan.finished
    expected = [*((i, 3) for i in range(10)), (4, 9), (5, 9), (3, 9), (4, 27)]
    assert play(plan, tmp_path, good) == expected
    assert plan.finished
    statuses = [read_result(point_workdir(tmp_path, point))["status"] for point in plan.points]
    assert statuses == ["stopped"] * 4 + ["done"] + ["stopped"] * 5


@pytest.mark.parametrize("kill_after", [1, 9, 10, 11, 13, 14])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, kill_after):
    points = make_points(10)
    expected = play(make(points, tmp_path / "whole"), tmp_path / "whole", good)
    plan = make(points, tmp_path / "cut")
    played = play(plan, tmp_path / "cut", good, kill_after)
    plan.next()  # it was running
    again = make(points, tmp_path / "cut")
    assert played + play(again, tmp_path / "cut", good) == expected
    assert again.finished


def test_several_jobs_send_the_best_of_those_that_have_arrived_on(tmp_path):
    """Algorithm 2 of Li et al. 2020: after three results the best of them goes on, before a fourth point starts."""
    plan = make(make_points(9), tmp_path, asynchronous=True)
    first = [plan.next() for _ in range(3)]
    assert [task.point.index for task in first] == [0, 1, 2]
    for task in first[:2]:
        plan.ended(task, pretend(task, tmp_path, good))
    fourth = plan.next()
    assert (fourth.point.index, fourth.stop_after) == (3, 3)
    plan.ended(first[2], pretend(first[2], tmp_path, good))
    promoted = plan.next()
    assert (promoted.point.index, promoted.stop_after) == (2, 9)
    for task in (fourth, promoted):
        plan.ended(task, pretend(task, tmp_path, good))
    rest = play(plan, tmp_path, good)
    # 3 is the best of four; 4, the best of five, is the best of three in the second rung. 2 went on too early.
    assert rest == [(3, 9), (4, 3), (4, 9), (4, 27), (5, 3), (5, 9), (6, 3), (7, 3), (8, 3)]
    assert plan.finished


def test_a_rung_waits_for_its_last_point_though_it_could_do_without(tmp_path):
    plan = make(make_points(3), tmp_path)
    tasks = [plan.next() for _ in range(3)]
    for task in tasks[:2]:
        plan.ended(task, pretend(task, tmp_path, good))
    assert plan.next() is None
    plan.ended(tasks[2], pretend(tasks[2], tmp_path, good))
    assert plan.next().stop_after == 9


def test_failed_and_diverging_points_rank_last_and_never_go_on(tmp_path):
    def value(index, step):
        return {0: None, 1: math.nan, 2: math.inf}.get(index, -5.0)

    plan = make(make_points(4), tmp_path)
    assert play(plan, tmp_path, value) == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 9), (3, 27)]
    plan = make(make_points(2), tmp_path)
    assert play(plan, tmp_path, value) == [(0, 3)]  # started again, what failed is tried again
    assert plan.finished


def test_a_point_that_a_signal_stopped_waits_for_the_next_command(tmp_path):
    points = make_points(3)
    plan = make(points, tmp_path)
    plan.ended(plan.next(), None)
    assert play(plan, tmp_path, good) == [(1, 3), (2, 3)]
    assert not plan.finished
    assert play(make(points, tmp_path), tmp_path, good) == [(0, 3), (2, 9), (2, 27)]


def test_points_added_later_join_the_first_rung(tmp_path):
    play(make(make_points(4), tmp_path), tmp_path, good)
    assert play(make(make_points(6), tmp_path), tmp_path, good) == [(4, 3), (5, 3), (4, 9), (5, 9), (4, 27)]


def test_a_smaller_metric_may_be_better_and_a_missing_one_is_named(tmp_path):
    points = make_points(3)
    plan = make(points, tmp_path / "a", deciding=("test/top1", False))
    assert play(plan, tmp_path / "a", good)[3:] == [(0, 9), (0, 27)]
    with pytest.raises(ConfigError, match="'test/top5' decides, and the results do not have it: test/top1"):
        play(make(points, tmp_path / "b", deciding=("test/top5", True)), tmp_path / "b", good)


def test_a_point_that_went_on_ends_as_one_that_was_trained_alone(tmp_path):
    """Bit for bit; trained for real, through the results that the rungs leave."""
    points = make_points(3)
    plan = make(points, tmp_path)
    order = []
    while (task := plan.next()) is not None:
        order.append((task.point.index, task.stop_after))
        plan.ended(task, run_point(task.point, tmp_path, stop_after=task.stop_after))
    (best, _), (last, end) = order[-2:]
    assert [steps for _, steps in order] == [3, 3, 3, 9, None]
    assert best == last
    assert end is None
    folder = point_workdir(tmp_path, points[best])
    result = read_result(folder)
    assert (result["status"], result["step"], sorted(result["rungs"])) == ("done", 27, ["3", "9"])
    state, metrics = train(points[best].config, tmp_path / "alone")
    ours, _ = train(points[best].config, folder)  # at its end already: reads what is there
    for a, b in zip(jax.tree.leaves((ours.params, ours.opt_state)), jax.tree.leaves((state.params, state.opt_state))):
        np.testing.assert_array_equal(a, b)
    assert result["metrics"]["test/loss"] == metrics["test/loss"]
    first = json.loads(json.dumps(metrics))["test/top1"]
    assert result["metrics"]["test/top1"] == first
