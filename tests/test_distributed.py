"""Jobs of several processes on this machine, joined over loopback: the same bits as one process, and a common end.

Every process is one device, so that 2 processes are to be compared with 2 devices of this process.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.helpers import Cut, metrics_lines, spread_config
from vit_flax import distributed, trainer
from vit_flax.checkpoint_record import read_record, steps_in
from vit_flax.checksums import checksums, differences
from vit_flax.job import Job, build
from vit_flax.signals import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent
LIMIT_SECS = 240  # of any wait: nothing of this may hang
SHORT = ("--start_timeout_secs=120", "--heartbeat_timeout_secs=15", "--shutdown_timeout_secs=15")
DEVICES = "--xla_force_host_platform_device_count=8"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """The processes of a job; killed at the end, whatever happened."""

    def __init__(self, num, workdir, *overrides, code=None):
        env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(DEVICES, ""), "PYTHONUNBUFFERED": "1"}
        run = ["-c", code] if code else ["-m", "vit_flax.main"]
        together = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={num}"] if num > 1 else []
        self.logs = [workdir.with_name(f"{workdir.name}.{i}.{time.monotonic_ns()}.log") for i in range(num)]
        self.processes = []
        for i, log in enumerate(self.logs):
            own = [*together, f"--process_id={i}"] if num > 1 else []
            with open(log, "w") as file:
                arguments = ["--config=tests/configs/spread.py", f"--workdir={workdir}", *own, *SHORT, *overrides]
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *run, *arguments], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, limit_secs=LIMIT_SECS):
        """Exit codes, once all have ended."""
        end = time.monotonic() + limit_secs
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]

    def says(self, i):
        return self.logs[i].read_text()

    def wait_for(self, text):
        """Until process 0 has printed it."""
        end = time.monotonic() + LIMIT_SECS
        while text not in self.says(0):
            assert time.monotonic() < end, self.says(0)
            assert self.processes[0].poll() is None, self.says(0)
            time.sleep(0.05)


@functools.cache
def straight(num_steps, total_steps, **mesh):
    """Checksums of the state after so many steps without a break, on as many devices of this process."""
    num_devices = max(mesh.values()) if len(mesh) == 1 else 4
    job = build(spread_config(run__total_steps=total_steps).to_dict() | dict(mesh=mesh), jax.devices()[:num_devices])
    state = jax.jit(job.init, out_shardings=jax.tree.map(lambda x: x.sharding, job.abstract_state()))()
    step, batches = job.train_step(), job.train_batches(0)
    for _ in range(num_steps):
        state, _ = step(state, next(batches))
    return checksums(state)


def saved(workdir, step):
    return read_record(workdir / "checkpoints" / str(step))["checksums"]


class Killed(Exception):
    pass


def test_from_one_process_to_two_with_the_same_bits(tmp_path, monkeypatch):
    """Steps 1 to 4 on one process with two devices, 5 to 10 on two with one; FSDP: each has half of the state."""
    workdir, whole = tmp_path / "run", Job.train_batches
    config = spread_config(mesh__fsdp=2)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "train_batches", lambda self, start: Cut(whole(self, start), 4, Killed))
        patch.setattr(trainer, "build", lambda config, **more: build(config, jax.devices()[:2], **more))
        patch.setattr(trainer.Loop, "_save_after", lambda *_: None)
        with pytest.raises(Killed):
            trainer.train(config, workdir)
    assert steps_in(workdir / "checkpoints") == [4]
    with Group(2, workdir, "--config.mesh.fsdp=2") as group:
        assert group.wait() == [0, 0], group.says(0) + group.says(1)
        # Process 1 neither prints nor writes.
        assert "step 10/10" in group.says(0)
        assert "step" not in group.says(1)
    assert differences(saved(workdir, 10), straight(10, 10, fsdp=2)) == {}
    # The evaluation counts each of the 359 examples once, although 2 x 64 does not divide them.
    last = json.loads(metrics_lines(workdir)[-1])
    assert last["test/count"] == 359
    again = trainer.evaluate(spread_config(), workdir)  # one process, eight devices, another mesh
    assert again["test/top1"] == last["test/top1"]
    assert again["test/loss"] == pytest.approx(last["test/loss"], rel=1e-5)


def test_sigterm_to_one_process_stops_all_after_the_same_step(tmp_path):
    workdir, endless = tmp_path / "run", ("--config.run.total_steps=1000000", "--config.checkpoint.every_steps=1000000")
    with Group(2, workdir, "--config.mesh.fsdp=2", "--config.run.log_every_steps=5", *endless) as group:
        group.wait_for("step 5/")
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.wait() == [EXIT_PREEMPTED] * 2, group.says(0) + group.says(1)
        [step] = steps_in(workdir / "checkpoints")
        assert f"Stopped by SIGTERM after step {step};" in group.says(0)
    assert differences(saved(workdir, step), straight(step, 1_000_000, fsdp=2)) == {}


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_goes_on_with_the_same_bits(tmp_path):
    """And goes on in one process, which reads what two wrote."""
    workdir = tmp_path / "run"
    more = ("--config.run.total_steps=200", "--config.checkpoint.every_steps=20", "--config.run.log_every_steps=20")
    with Group(2, workdir, "--config.mesh.fsdp=2", *more) as group:
        group.wait_for("step 60/")
        group.processes[1].kill()
        assert group.wait(60)[0] not in (0, EXIT_PREEMPTED)
        assert "peer" in group.says(0) or "another task died" in group.says(0), group.says(0)
    assert 20 <= max(steps_in(workdir / "checkpoints")) < 200
    with Group(1, workdir, "--virtual_devices=2", "--config.mesh.fsdp=2", *more) as alone:
        assert alone.wait() == [0], alone.says(0)
    assert differences(saved(workdir, 200), straight(200, 200, fsdp=2)) == {}


FAILS = """
import sys
import jax
from absl import app
from tests.helpers import Cut
from vit_flax import main
from vit_flax.job import Job

whole = Job.train_batches

def fails(self, start_step):
    batches = whole(self, start_step)
    return Cut(batches, 6, KeyError("a bug on one host")) if jax.process_index() == 1 else batches

Job.train_batches = fails
app.run(main.main, flags_parser=main.parse_flags)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_traceback(tmp_path):
    with Group(2, tmp_path / "run", "--config.run.total_steps=100000", code=FAILS) as group:
        codes = group.wait()
        assert all(code not in (0, EXIT_PREEMPTED) for code in codes), codes
        assert "Traceback" in group.says(1)
        assert "a bug on one host" in group.says(1)
        assert "error: process 1 of 2 ends because of the error above" in group.says(1)


DISK_FULL = """
import jax
from absl import app
from orbax.checkpoint import future
from vit_flax import main
from vit_flax.checkpoint_record import RecordHandler

whole = RecordHandler.async_save

async def write():
    raise OSError(28, "No space left on device")

async def full(self, directory, item=None, args=None):
    if jax.process_index() == 1 and "/STEP." in str(directory):
        return [future.CommitFutureAwaitingContractedSignals(write(), name="full")]
    return await whole(self, directory, item, args)

RecordHandler.async_save = full
app.run(main.main, flags_parser=main.parse_flags)
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 10])
def test_a_save_that_fails_in_one_process_ends_all(step, tmp_path):
    """While the run goes on, and at its end."""
    workdir = tmp_path / "run"
    with Group(2, workdir, code=DISK_FULL.replace("STEP", str(step))) as group:
        codes = group.wait(120)
        assert all(code not in (0, EXIT_PREEMPTED) for code in codes), codes
        assert f"Checkpoint {step} could not be written" in group.says(1)
        assert "No space left on device" in group.says(1)
    assert step not in steps_in(workdir / "checkpoints")


@pytest.mark.slow
def test_several_processes_that_diverge_save_the_parameters_from_before(tmp_path):
    workdir, overrides = tmp_path / "run", ("--config.optim.lr=1e38", "--config.run.max_skipped_steps=3")
    with Group(2, workdir, *overrides, "--config.checkpoint.every_steps=100") as group:
        assert group.wait(120) == [2, 2], group.says(0) + group.says(1)
        [step] = steps_in(workdir / "checkpoints")
        assert f"Checkpoint {step} has the parameters from before these steps" in group.says(0)


def test_a_job_whose_other_process_never_comes_says_what_it_waited_for(tmp_path):
    with Group(2, tmp_path / "run", "--start_timeout_secs=2") as group:
        group.processes[1].kill()
        assert group.wait()[0] == 2
        assert "error: process 0 of 2 waits on 127.0.0.1:" in group.says(0)
        assert "not within 2 s (--start_timeout_secs)" in group.says(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_processes_that_share_rows_in_pairs(tmp_path):
    """Two data replicas of two processes each, which cut the heads between them and read the same rows."""
    workdir = tmp_path / "run"
    with Group(4, workdir, "--config.mesh.data=2", "--config.mesh.tensor=2") as group:
        assert group.wait() == [0] * 4, "".join(map(group.says, range(4)))
    assert differences(saved(workdir, 10), straight(10, 10, data=2, tensor=2)) == {}
    assert json.loads(metrics_lines(workdir)[-1])["test/count"] == 359


@pytest.mark.slow
def test_two_replicas_equal_one_process_with_two_devices(tmp_path):
    workdir = tmp_path / "run"
    with Group(2, workdir) as group:
        assert group.wait() == [0, 0], group.says(0) + group.says(1)
    assert differences(saved(workdir, 10), straight(10, 10, data=2)) == {}


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_all(tmp_path):
    workdir, endless = tmp_path / "run", ("--config.run.total_steps=1000000", "--config.run.log_every_steps=5")
    with Group(2, workdir, *endless) as group:
        group.wait_for("step 5/")
        group.processes[0].send_signal(signal.SIGINT)
        assert group.wait() == [EXIT_PREEMPTED] * 2, group.says(0) + group.says(1)


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_for_all_is_passed_over_by_all(tmp_path):
    workdir = tmp_path / "run"
    with Group(2, workdir, "--config.mesh.fsdp=2") as group:
        assert group.wait() == [0, 0]
    before = metrics_lines(workdir)
    (workdir / "checkpoints" / "10" / "record" / "record").write_text("{}")
    with Group(2, workdir, "--config.mesh.fsdp=2") as group:
        assert group.wait() == [0, 0], group.says(0) + group.says(1)
        assert "Moved the damaged checkpoint 10" in group.says(0)
    assert differences(saved(workdir, 10), straight(10, 10, fsdp=2)) == {}
    assert metrics_lines(workdir) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, 0), "needs --num_processes and --process_id"),
        (("host:1", 2, 2), "--process_id must be at least 0 and below num_processes=2, got 2"),
        (("host", 2, 0), "must be host:port or auto, got 'host'"),
        (("auto", 2, 0), "finds out --num_processes and --process_id: leave them out"),
        ((None, 2, 0), "need --coordinator host:port"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(*arguments)


def test_only_a_loopback_coordinator_is_bound_to_one_interface():
    assert distributed._arguments("127.0.0.1:80", 2, 0)["coordinator_bind_address"] == "127.0.0.1:80"
    assert distributed._arguments("node1:80", 2, 0)["coordinator_bind_address"] is None


def test_handler_of_sigterm_stays_that_of_jax():
    """Python's would take its place without a word."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with distributed.StopTogether():
        assert signal.getsignal(signal.SIGTERM) == before[0]
        assert signal.getsignal(signal.SIGINT) != before[1]
    assert signal.getsignal(signal.SIGINT) == before[1]


def test_a_process_alone_agrees_with_itself():
    assert distributed.from_main({"a": [1, "b"]}) == {"a": [1, "b"]}
    with pytest.raises(KeyError), distributed.agreed("reading"):
        raise KeyError
