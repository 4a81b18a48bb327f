import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vit_flax.data import workers
from vit_flax.data.arrays import Arrays
from vit_flax.data.decode import DecodeError
from vit_flax.data.pipeline import eval_batches, train_batches


class AddNoise:
    deterministic = False

    def __call__(self, example, rng):
        return {**example, "image": example["image"] ^ rng.integers(0, 256, example["image"].shape, dtype=np.uint8)}


class FailsAt:
    deterministic = True

    def __init__(self, label):
        self.label = label

    def __call__(self, example, rng):
        if example["label"] == self.label:
            raise DecodeError(example["id"], "it is torn")
        return example


def source(num_examples=21, side=2):
    images = np.arange(num_examples, dtype=np.uint8)[:, None, None, None] * np.ones((1, side, side, 3), np.uint8)
    return Arrays(split="train", arrays={"train": (images, np.arange(num_examples))})


def take(batches, num_batches):
    taken = [{key: np.array(value) for key, value in batch.items()} for batch in itertools.islice(batches, num_batches)]
    kinds = {type(batch["image"]).__name__ for batch in taken}
    batches.close()
    return taken, kinds


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_do_not_depend_on_the_number_of_workers():
    arguments = {"transform": AddNoise(), "batch_size": 8, "seed": 1}
    whole, _ = take(train_batches(source(), **arguments), 9)
    assert_same(whole[:4], take(train_batches(source(), num_workers=2, **arguments), 4)[0])
    rest = train_batches(source(), num_workers=1, start_step=4, num_threads=2, **arguments)
    assert_same(whole[4:], take(rest, 5)[0])


def test_workers_evaluate_and_report_what_they_skip():
    batches = eval_batches(
        source(), transform=FailsAt(5), batch_size=4, num_workers=1, decode_once=False, on_error="skip"
    )
    running = iter(batches)
    found = [batch["image"][batch["mask"]][:, 0, 0, 0].tolist() for batch in running]
    assert found == [[0, 1, 2, 3], [4, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19], [20]]
    assert running.skipped == {5: 1}
    strict = iter(eval_batches(source(), transform=FailsAt(5), batch_size=4, num_workers=1, decode_once=False))
    for _ in range(2):  # Grain's iterator would end quietly the second time
        with pytest.raises(DecodeError, match=r"arrays:train\[5\]"):
            list(strict)
    strict.close()


def test_a_small_shared_memory_is_not_used(monkeypatch, caplog):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: usage._replace(free=64))
    arguments = {"transform": AddNoise(), "batch_size": 8, "seed": 1}
    expected, _ = take(train_batches(source(), **arguments), 3)
    batches = train_batches(source(), num_workers=1, **arguments)
    assert type(next(batches)["image"]) is np.ndarray
    assert_same(expected[1:], take(batches, 2)[0])
    assert "batches go through pipes" in caplog.text


def test_shared_memory_is_used_where_it_fits(monkeypatch):
    usage = shutil.disk_usage("/")
    batch_bytes = 1000
    for free, fits in ((2 * 4 * batch_bytes, False), (2 * 4 * batch_bytes + 1, True)):
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert workers.fits_shared_memory(2, batch_bytes) is fits


def test_default_threads(monkeypatch):
    monkeypatch.setattr(workers, "num_cores", lambda: 64)
    assert workers.default_threads(0, 19 * 2**20) == 16
    assert workers.default_threads(8, 19 * 2**20) == 8
    assert workers.default_threads(0, 2**30) == 3  # and one batch more: 4 GiB
    assert workers.default_threads(0, 2**40) == 1
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    assert workers.default_threads(0, 1) == 2
    assert workers.default_threads(4, 1) == 1


def test_reading_ahead_is_bounded():
    read = []

    class Note:
        deterministic = True

        def __call__(self, example, rng):
            read.append(int(example["label"]))
            return example

    batches = eval_batches(source(200), transform=Note(), batch_size=1, num_threads=2, decode_once=False)
    running = iter(batches)
    read.clear()
    next(running)
    time.sleep(0.5)
    assert len(read) <= 1 + 3  # the one we have, and num_threads + 1 more
    running.close()


JOB = """
import sys, time
from tests.test_workers import AddNoise, source
from vit_flax.data.pipeline import Ahead, train_batches
if __name__ == "__main__":
    batches = train_batches(source(side=64), transform=AddNoise(), batch_size=8, seed=0, num_workers=1)
    if sys.argv[1:] == ["exit"]:
        import gc, jax
        gc.disable()  # else it may happen to run in time
        ahead = Ahead(batches, lambda batch: jax.block_until_ready(jax.device_put(batch)), count_skipped=False)
        total = sum(int(next(ahead)["image"].sum()) for _ in range(3))
        del ahead, batches
        print("running", flush=True)
    else:
        next(batches)
        print("running", flush=True)
        time.sleep(600)
"""


def start_job(tmp_path, *words):
    (tmp_path / "job.py").write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "job.py"), *words]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert job.stdout.readline() == "running\n"
    return job


def members(session):
    """Processes of a session, except zombies."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/stat") as stat:
                    fields = stat.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder))
    return found


def survivors_of(session):
    """What is left of it after ten seconds, and killed then."""
    for _ in range(100):
        if not members(session):
            break
        time.sleep(0.1)
    survivors = members(session)
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    return survivors


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_workers_die_with_a_killed_trainer(tmp_path):
    with start_job(tmp_path) as job:
        assert len(members(job.pid)) >= 2  # the trainer and its worker
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert not survivors_of(job.pid)


ORPHAN = """
import multiprocessing, os, time
from vit_flax.data.workers import die_with_parent

def work():
    trainer = os.getppid()
    os.kill(trainer, 9)
    while os.getppid() == trainer:
        time.sleep(0.01)
    die_with_parent()
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(600)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_a_worker_dies_whose_trainer_was_killed_while_it_started(tmp_path):
    (tmp_path / "job.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(tmp_path / "job.py")], env=environment, start_new_session=True) as job:
        job.wait()
        assert not survivors_of(job.pid)


def test_a_job_ends_quietly_without_closing(tmp_path):
    """JAX still shares memory with the last batches then; without a last collection Python calls it leaked."""
    with start_job(tmp_path, "exit") as job:
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "Traceback" not in errors
    assert "leaked" not in errors
