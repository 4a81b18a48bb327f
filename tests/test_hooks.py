import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from vit_flax import hooks
from vit_flax.hooks import Every, Profile, check_profile_steps
from vit_flax.job import Job
from vit_flax.step import TrainState
from vit_flax.writer import Writer

STATE = TrainState(*[None] * 8).replace(step=jnp.int32(0))


def acted_at(total, first=1, **schedule):
    acted = []
    every = Every(lambda step, _: acted.append(step), total_steps=total, **schedule)
    for step in range(first, total + 1):
        every(step, STATE)
    return acted


def test_every_so_many_steps_and_after_the_last():
    assert acted_at(10, every_steps=4) == [4, 8, 10]
    assert acted_at(8, every_steps=4) == [4, 8]
    assert acted_at(3, every_steps=4) == [3]
    assert acted_at(3, every_steps=1) == [1, 2, 3]


@pytest.mark.parametrize("schedule", [{}, {"every_steps": 0}, {"every_steps": None}, {"every_secs": None}])
def test_no_distance_is_only_the_last_step(schedule):
    assert acted_at(10, **schedule) == [10]


def test_a_resumed_run_does_what_an_uninterrupted_one_would():
    whole = acted_at(10, every_steps=4)
    for start in range(10):
        assert acted_at(10, first=start + 1, every_steps=4) == [step for step in whole if step > start]


def test_every_so_many_seconds_counts_from_the_last_time():
    now = [100.0]
    every = Every(lambda step, _: acted.append(step), total_steps=9, every_secs=5.0, clock=lambda: now[0])
    acted = []
    for step, passed in enumerate([2.0, 2.9, 0.1, 4.9, 0.2, 11.0, 4.0, 0.5, 0.1], start=1):
        now[0] += passed
        every(step, STATE)
    assert acted == [3, 5, 6, 9]  # 5.0 s, 5.1 s, 11 s (once, not twice), and the last step


def test_time_that_the_action_takes_does_not_count():
    now = [0.0]

    def slow(step, _):
        acted.append(step)
        now[0] += 100.0

    acted = []
    every = Every(slow, total_steps=100, every_secs=5.0, clock=lambda: now[0])
    for step in (1, 2, 3):
        now[0] += 3.0
        every(step, STATE)
    assert acted == [2]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (dict(every_steps=3, every_secs=2.0), "give one of them"),
        (dict(every_steps=-3), "cannot be negative"),
        (dict(every_secs=-1.0), "cannot be negative"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        Every(lambda *_: None, total_steps=10, **schedule)


def test_seconds_need_one_process(monkeypatch):
    monkeypatch.setattr(hooks.jax, "process_count", lambda: 2)
    Every(lambda *_: None, total_steps=10, every_steps=3)
    with pytest.raises(ValueError, match="use every_steps"):
        Every(lambda *_: None, total_steps=10, every_secs=3.0)


@pytest.fixture
def traces(monkeypatch):
    """What was asked of the profiler."""
    calls = []
    monkeypatch.setattr(hooks.jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder}"))
    monkeypatch.setattr(hooks.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def test_profile_traces_the_steps_from_first_to_last(traces, tmp_path):
    said = []
    profile = Profile((4, 6), folder=tmp_path, say=said.append)
    for step in range(1, 10):
        profile(step, STATE)
        traces.append(step)
    profile.close()
    assert traces == [1, 2, f"start {tmp_path}", 3, 4, 5, "stop", 6, 7, 8, 9]
    assert said == [f"A trace of steps 4 to 6 is in {tmp_path}."]


def test_profile_of_a_resumed_run(traces, tmp_path):
    said = []
    profile = Profile((4, 6), folder=tmp_path, say=said.append)
    for step in range(5, 9):  # goes on from step 4
        profile(step, STATE)
    assert traces == [f"start {tmp_path}", "stop"]
    assert said == [f"A trace of steps 6 to 6 is in {tmp_path}."]  # and says so
    late = Profile((4, 6), folder=tmp_path, say=said.append)
    late(7, STATE)
    late.close()
    assert len(traces) == 2


def test_profile_that_the_run_ends_in_is_written(traces, tmp_path):
    profile = Profile((2, 100), folder=tmp_path, say=print)
    profile(1, STATE)
    profile.close()
    profile.close()
    assert traces == [f"start {tmp_path}", "stop"]


def test_of_several_processes_the_first_one_traces(traces, tmp_path):
    """Those of one machine would write the same file."""
    run = SimpleNamespace(profile_steps=(2, 3))
    for active in (False, True):
        writer = Writer(tmp_path, {}, start_step=0, total_steps=9, quiet=True)
        writer.active = active
        Job.profile(SimpleNamespace(run=run), writer)(1, STATE)
    assert traces == [f"start {tmp_path / 'profile'}"]


@pytest.mark.parametrize("steps", [(1, 5), (5, 4), (3,), (2, 3, 4), (2, 11)])
def test_steps_that_cannot_be_traced(steps):
    with pytest.raises(ValueError, match="2 <= first <= last <= 10"):
        check_profile_steps(steps, 10)
    check_profile_steps((2, 10), 10)


def test_trace_is_a_file_that_holds_events(tmp_path):
    profile = Profile((2, 2), folder=tmp_path, say=print)
    profile(1, STATE)
    jnp.ones(3).block_until_ready()
    profile(2, STATE)
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    import gzip

    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
