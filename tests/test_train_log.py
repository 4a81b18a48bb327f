import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax import train_log
from vit_flax.train_log import TrainLog, device_memory, duration
from vit_flax.writer import Writer


class Collected:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.lines = []

    def scalars(self, step, values):
        self.lines.append({"step": step, **values})

    def picture(self, step, name, image):
        self.lines.append((step, name, image.shape))

    def finish(self, results):
        self.lines.append(dict(results))

    def close(self):
        self.lines.append("closed")


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(train_log.time, "perf_counter", lambda: now[0])
    return now


def make_log(**arguments):
    sink = Collected()
    writer = Writer(None, {"collected": lambda: sink}, start_step=0, total_steps=10)
    defaults = dict(every_steps=3, batch_size=8, total_steps=10, start_step=0, open_interval={}, last={})
    defaults |= dict(learning_rates=np.zeros(10), mfu_per_image_per_sec=None)
    return TrainLog(writer, **(defaults | arguments)), sink.lines


def metrics(step):
    return {"loss": jnp.float32(1 / step), "top1": jnp.float32(step)}


def run(log, clock, steps, secs=2.0, waited=0.5, metrics=metrics):
    for step in steps:
        clock[0] += secs
        log(step, metrics(step), waited)


def test_means_over_intervals_and_the_rest_at_the_end(clock):
    log, lines = make_log()
    run(log, clock, range(1, 11))
    log.flush()
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    third = [float(np.float32(1 / step)) for step in (4, 5, 6)]
    assert lines[1]["train/loss"] == sum(third) / 3
    assert lines[1]["train/top1"] == 5.0
    assert lines[3]["train/top1"] == 10.0
    assert log.last["top1"] == 10.0


def test_numbers_are_fetched_after_the_next_step_was_dispatched(clock, monkeypatch):
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(train_log.jax, "device_get", lambda x: fetched.append(len(x)) or real(x))
    log, lines = make_log()
    run(log, clock, [1, 2, 3])
    assert (fetched, lines) == ([], [])
    run(log, clock, [4])
    assert fetched == [3]
    assert [line["step"] for line in lines] == [3]


def test_speed_leaves_out_compiling_and_evaluations(clock):
    log, lines = make_log(mfu_per_image_per_sec=0.01)
    clock[0] += 1000.0  # compiles inside the first call of the step
    run(log, clock, [1], secs=0.0)
    run(log, clock, [2, 3, 4], secs=2.0)  # the device is through with step 3 when step 4 was dispatched
    assert lines[0]["train/images_per_sec"] == pytest.approx(3 * 8 / 6)
    assert lines[0]["train/mfu_percent"] == pytest.approx(4.0)
    clock[0] += 500.0
    log.exclude(500.0)
    run(log, clock, [5, 6, 7], secs=2.0)
    assert lines[1]["train/images_per_sec"] == pytest.approx(3 * 8 / 6)
    assert lines[1]["train/data_wait_percent"] == pytest.approx(100 * 1.5 / 6)


def test_no_peak_no_mfu_and_no_memory_on_a_cpu(clock):
    log, lines = make_log()
    run(log, clock, [1, 2, 3, 4])
    assert not {"train/mfu_percent", "train/device_memory_gib"} & lines[0].keys()


def test_learning_rate_is_that_of_the_last_step(clock):
    log, lines = make_log(learning_rates=np.arange(10) / 10)
    run(log, clock, range(1, 11))
    log.flush()
    assert [line["train/lr"] for line in lines] == [0.2, 0.5, 0.8, 0.9]


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(clock, cut):
    def metrics(step):  # two steps and a whole interval are not finite
        return {"loss": jnp.float32(np.nan if step in (2, 3, 7, 8, 9) else 1 / step), "top1": jnp.float32(step)}

    def numbers(lines):
        return [{k: v for k, v in line.items() if k not in train_log.CLOCK} for line in lines]

    whole, expected = make_log()
    run(whole, clock, range(1, 11), metrics=metrics)
    whole.flush()
    first, lines = make_log()
    run(first, clock, range(1, cut + 1), metrics=metrics)
    left = json.loads(json.dumps(first.open_interval()))
    second, more = make_log(start_step=cut, open_interval=left)
    run(second, clock, range(cut + 1, 11), metrics=metrics)
    clock[0] += 2.0
    second.flush()
    assert numbers(lines + more) == numbers(expected)
    rates = [line["train/images_per_sec"] for line in more]
    assert max(rates) <= 3 * 8 / 2  # steps of the earlier process are not counted as fast ones


def test_what_is_kept_does_not_change_afterwards(clock):
    log, _ = make_log()
    run(log, clock, [1, 2])
    left = log.open_interval()
    before = json.dumps(left)
    run(log, clock, [3, 4])
    assert json.dumps(left) == before
    assert left["loss"][1] == 2


def test_a_step_that_is_not_finite_leaves_the_averages_of_the_others(clock):
    log, lines = make_log()
    for step in range(1, 8):
        bad = step in (2, 4, 5, 6)
        log(step, {"loss": jnp.float32(np.nan if bad else step), "skipped": jnp.int32(bad)}, 0.0)
    assert [line["train/loss"] for line in lines] == [2.0, None]
    assert [line["train/skipped"] for line in lines] == [pytest.approx(1 / 3), 1.0]


def test_device_memory_where_the_backend_reports_it(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30, "bytes_limit": 2**40}

    assert device_memory() == {}
    monkeypatch.setattr(train_log.jax, "local_devices", lambda: [Device()])
    assert device_memory() == {"device_memory_gib": 3.0}


def test_console_line_says_the_time_left(clock, capsys):
    log, _ = make_log(mfu_per_image_per_sec=0.01)
    run(log, clock, [1], secs=0.0)
    run(log, clock, [2, 3, 4], secs=20.0)
    # 60 s for 3 steps (the first one was dispatched when the clock started), 7 to go
    line = "step 3/10 loss 0.6111  top1 2.000  0 img/s  MFU 0.4%  data wait 2%  2m 20s left"
    assert capsys.readouterr().out.strip() == line


@pytest.mark.parametrize(
    ("secs", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (61.0, "1m 01s"), (3600 * 25 + 61.0, "25h 01m"), (np.inf, "?")]
)
def test_duration(secs, text):
    assert duration(secs) == text
