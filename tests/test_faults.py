"""Twenty faults, and what becomes of a run. docs/reliability.md has the list; where a fault is tested elsewhere:

 1  killed once, started again             test_killed_runs_end_like_an_undisturbed_one
 2  killed at 20 random moments            test_the_reliability_script (slow)
 3  newest checkpoint half deleted         test_checkpoint.py, test_a_damaged_newest_checkpoint_costs_some_steps
 4  30 flipped bits                        test_checkpoint.py, test_any_damage_of_a_run_falls_back_or_does_not_matter
 5  all checkpoints damaged                test_all_checkpoints_damaged_ends_the_command
 6  disk full during a save                test_checkpoint.py, test_the_reliability_script (slow)
 7  exception, exit, Ctrl-C after a save   test_checkpoint.py, test_trainer.py
 8  best, last and every checkpoint, NaN   test_checkpoint.py
 9  another config in the workdir          test_workdir.py, test_trainer.py, test_checkpoint.py
10  two trainers in one workdir            test_two_trainers_in_one_workdir
11  SIGTERM                                test_signals_*, test_a_signal_*, test_signals.py; to a group (slow)
12  two processes against two devices      with several hosts
13  one of two processes killed            with several hosts
14  an error on one of two processes       with several hosts
15  another number of devices              test_checkpoint.py
16  sharded against one device             with several hosts
17  workers and processes of the data      test_workers.py, test_pipeline.py
18  steps that are not finite              test_bad_steps_change_nothing_and_end_the_run, test_bad_steps.py
19  bad data                               test_decode.py, test_pipeline.py, test_sources.py, test_vit.py
20  hostile files                          test_sources.py, test_main.py, tests of the conversion
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import Changed, Cut, metrics_lines, tiny_config
from vit_flax import job as job_module
from vit_flax import reliability
from vit_flax.bad_steps import Diverged
from vit_flax.checkpoint import load_params
from vit_flax.checkpoint_record import read_record, steps_in
from vit_flax.lives import Lives, Reference, changed, small_config
from vit_flax.signals import EXIT_PREEMPTED
from vit_flax.step import OBJECTIVES, classification
from vit_flax.trainer import train

ROOT = Path(__file__).parent.parent
# Orbax leaves coroutines behind when a read or a write fails; they may be collected in any later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # of the processes
        yield Lives(tmp_path_factory.mktemp("lives"))


@pytest.fixture(scope="module")
def reference(lives):
    return Reference(lives, changed(small_config(40), evals__test=dict(type="classification", every_steps=20)))


def assert_held(rows):
    rows = list(rows)
    assert rows
    assert all(held for _, _, held in rows), rows


def test_killed_runs_end_like_an_undisturbed_one(lives, reference):
    assert_held(reliability.kills(lives, reference, random.Random(0), 3))


def test_signals_save_and_exit_with_the_documented_code(lives, reference):
    assert_held(reliability.signals(lives, reference, random.Random(0), 4))


def test_any_damage_of_a_run_falls_back_or_does_not_matter(lives, reference):
    assert_held(reliability.damage(lives, reference, random.Random(0), 30))


def test_a_damaged_newest_checkpoint_costs_some_steps(lives, reference):
    workdir = Path(shutil.copytree(reference.workdir, lives.folder / "half_deleted"))
    shutil.rmtree(workdir / "checkpoints" / "40" / "state" / "d")
    life = lives.start(workdir, reference.config)
    assert life.end() == 0
    assert life.said("Checkpoint 40 is damaged")
    assert life.said("Moved the damaged checkpoint 40 to")
    assert not life.said("Traceback")
    assert reference.is_end_of(workdir)


def test_all_checkpoints_damaged_ends_the_command(lives, reference):
    workdir = Path(shutil.copytree(reference.workdir, lives.folder / "all_damaged"))
    for record in workdir.glob("checkpoints/*/record/record"):
        record.write_text(record.read_text()[:-5])
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.parent != workdir}
    life = lives.start(workdir, reference.config)
    assert life.end() == 2
    assert life.said("error: None of the checkpoints 40, 35, 30 in")
    assert not life.said("Traceback")
    assert {path: path.read_bytes() for path in before} == before


def test_two_trainers_in_one_workdir(lives, reference):
    workdir = lives.folder / "two"
    first = lives.start(workdir, reference.config)
    first.wait_until(lambda: first.said("step "))
    first.send(signal.SIGSTOP)
    second = lives.start(workdir, reference.config)
    assert second.end() == 2
    assert second.said(f"in use by process {first.process.pid} on {socket.gethostname()}")
    first.send(signal.SIGCONT)
    assert first.end() == 0
    assert reference.is_end_of(workdir)


@pytest.mark.slow
def test_the_reliability_script():
    command = [sys.executable, "-m", "vit_flax.reliability", "--only", "kills", "signals", "disk_full", "damage"]
    done = subprocess.run([*command, "--times", "20"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "20 exact resumes; 0 partial checkpoints" in done.stdout
    print(done.stdout)


@pytest.mark.slow
def test_signal_to_a_group_with_data_workers(tmp_path):
    """As a scheduler or a terminal sends it: to the command, as a user starts it, and to all of its children."""
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.helpers import tiny_config\n\ndef get_config():\n"
        "    config = tiny_config(run__total_steps=100000, run__log_every_steps=5, checkpoint__every_steps=None)\n"
        "    config.data.update(dict(num_workers=2, decode_once=False))\n    return config\n"
    )
    command = [sys.executable, "-u", "-m", "vit_flax.main", "--config", config, "--workdir", tmp_path / "run"]
    for number, life in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            # A resumed life speaks of the left-over evaluation first; wait for a step of its own.
            any("/100000 loss" in line for line in process.stdout)
            os.killpg(process.pid, number)
            out, errors = process.communicate(timeout=120)
        assert process.returncode == EXIT_PREEMPTED, errors
        assert f"Stopped by {number.name} after step" in out
        assert len(steps_in(tmp_path / "run" / "checkpoints")) == life


# ------------------------------------------------------------------------------------------ faults inside the process


def raw(state):
    """Bits of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    data = ((p, jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for p, x in leaves)
    return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in data}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run in this process: state, metrics, workdir."""
    workdir = tmp_path_factory.mktemp("straight")
    state, _ = train(tiny_config(run__ema_decay=0.9), workdir)
    return raw(state), metrics_lines(workdir), workdir


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(straight, tmp_path, monkeypatch):
    """The evaluation is left, the step saved; the next life evaluates it, and ends like an undisturbed run."""
    config = tiny_config(run__ema_decay=0.9)
    whole = job_module.Data.eval

    def with_signal(self, **arguments):
        batches = whole(self, **arguments)

        class Signalled:
            def __iter__(self):
                for number, batch in enumerate(batches):
                    if number == 2:
                        signal.raise_signal(signal.SIGTERM)
                    yield batch

        return Signalled()

    monkeypatch.setattr(job_module.Data, "eval", with_signal)
    with pytest.raises(SystemExit) as left:
        train(config, tmp_path)
    assert left.value.code == EXIT_PREEMPTED
    record = read_record(tmp_path / "checkpoints" / "5")
    assert (record["metrics"], record["progress"]["evaluated"]) == ({}, False)
    monkeypatch.undo()
    state, _ = train(config, tmp_path)
    assert raw(state) == straight[0]
    assert metrics_lines(tmp_path) == straight[1]
    assert steps_in(tmp_path / "checkpoints") == steps_in(straight[2] / "checkpoints")


def test_the_evaluation_is_added_to_the_checkpoint_that_a_signal_left_without(tmp_path, monkeypatch):
    config = tiny_config(run__total_steps=5, checkpoint__every_steps=None)
    whole = job_module.Data.eval

    def stopped(self, **arguments):
        signal.raise_signal(signal.SIGTERM)
        return whole(self, **arguments)

    monkeypatch.setattr(job_module.Data, "eval", stopped)
    with pytest.raises(SystemExit):
        train(config, tmp_path)
    monkeypatch.undo()
    train(config, tmp_path)
    assert load_params(tmp_path, step="best").metrics["test/count"] == 359


def test_an_error_in_the_loop_loses_no_step(straight, tmp_path, monkeypatch):
    config = tiny_config(run__ema_decay=0.9)
    whole = job_module.Job.train_batches

    torn = ValueError("picture 17 is torn")
    monkeypatch.setattr(job_module.Job, "train_batches", lambda self, start: Cut(whole(self, start), 7, torn))
    with pytest.raises(ValueError, match="picture 17 is torn"):
        train(config, tmp_path)
    assert max(steps_in(tmp_path / "checkpoints")) == 7
    monkeypatch.undo()
    state, _ = train(config, tmp_path)
    assert raw(state) == straight[0]
    assert metrics_lines(tmp_path) == straight[1]


def test_bad_steps_change_nothing_and_end_the_run(tmp_path, monkeypatch, capsys):
    """Batches 3, and 8 and later, make the loss NaN."""
    good, whole = classification, job_module.Job.train_batches

    def marked(self, start_step):
        def mark(number, batch):
            step = start_step + number + 1
            return {**batch, "mask": batch["mask"].at[0].set(not (step == 3 or step >= 8))}

        return Changed(whole(self, start_step), mark)

    def objective(params, batch, key, hparams, **parts):
        loss, metrics = good(params, {**batch, "mask": jnp.ones_like(batch["mask"])}, key, hparams, **parts)
        return loss * jnp.where(batch["mask"][0], 1.0, jnp.nan), metrics

    monkeypatch.setattr(job_module.Job, "train_batches", marked)
    monkeypatch.setitem(OBJECTIVES, "classification", objective)
    config = tiny_config(
        run__ema_decay=0.9,
        run__total_steps=40,
        run__log_every_steps=100,
        run__max_skipped_steps=4,
        run__dump_bad_batches=2,
        checkpoint__every_steps=1,
        checkpoint__keep_last=40,
        evals__test=dict(type="classification", every_steps=None),
    )
    with pytest.raises(Diverged, match=r"(?s)4 steps in a row, up to step 11.*loss nan.*Checkpoint 12 has the param"):
        train(config, tmp_path)
    records = {step: read_record(tmp_path / "checkpoints" / str(step)) for step in steps_in(tmp_path / "checkpoints")}

    def learned(step):
        sums = records[step]["checksums"]
        return {path: sums[path] for path in sums if path.split("/")[0] in ("params", "opt_state", "ema")}

    assert learned(3) == learned(2)
    assert learned(4) != learned(3)
    assert learned(7) != learned(6)
    assert learned(12) == learned(8) == learned(7)
    assert np.isfinite(load_params(tmp_path).params["head"]["kernel"]).all()
    assert "Step 3 changed nothing: loss nan, grad_norm nan, update_norm nan, param_norm nan (1 in a row)." in (
        capsys.readouterr().out
    )
    assert sorted(path.name for path in (tmp_path / "bad_batches").iterdir()) == ["step_3.npz", "step_8.npz"]
