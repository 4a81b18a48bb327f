"""Checkpoints: nothing wrong is ever restored, what is wrong is named, and what may be deleted is."""

import contextlib
import json
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_flax import checkpoint, distributed
from vit_flax.checkpoint import CheckpointMismatch, Checkpoints, SaveFailed, load_params, read_newest
from vit_flax.checkpoint_record import read_record, steps_in
from vit_flax.checksums import checksums
from vit_flax.reliability import damage_one_file, small_file_system

# Orbax leaves coroutines behind when a read or a write fails; they may be collected in any later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

IDENTITY = {"model.width": 8, "run.seed": 0, "pairs": [("a", 1)]}
ABOUT = {
    "config": {"checkpoint": {"best_metric": "test/top1"}},
    "class_names": ["cat", "dog"],
    "preprocessing": {"mean": [0.5]},
}


def make_state(step: int) -> dict:
    """Every kind of leaf that a TrainState has."""
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "params": {"kernel": jax.random.normal(key, (64, 32)), "half": jnp.full((5,), step, jnp.bfloat16)},
        "opt_state": ({"mu": jnp.full((64, 32), step, jnp.float32)}, {}),
        "ema": None,
        "flag": jnp.array([True, False]),
        "key": key,
    }


def target(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def saved(directory, steps=(1, 2, 3), metrics=lambda step: {"test/top1": 1.0 - abs(step - 2)}, **options):
    with Checkpoints(str(directory), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), identity=IDENTITY, about=ABOUT, metrics=metrics(step))
    return directory


def restored(directory, like=None, identity=IDENTITY):
    with Checkpoints(str(directory)) as checkpoints:
        return checkpoints.restore(target(like or make_state(0)), identity=identity)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with the checkpoints 1, 2 and 3; not to be changed."""
    workdir = tmp_path_factory.mktemp("three")
    saved(workdir / "checkpoints", keep_last=3)
    return workdir


@pytest.fixture
def own_three(three, tmp_path):
    """A copy of its checkpoints."""
    return Path(shutil.copytree(three / "checkpoints", tmp_path / "checkpoints"))


def data_files(directory, step):
    files = (path for path in (directory / str(step) / "state").rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.stat().st_size)


# ------------------------------------------------------------------------------------------------- save and restore


def test_newest_comes_back_bit_for_bit(own_three):
    found = restored(own_three)
    assert found.step == 3
    assert checksums(found.state) == checksums(make_state(3))
    assert jax.tree.map(lambda x: x.dtype, found.state) == jax.tree.map(lambda x: x.dtype, make_state(3))


def test_a_device_that_is_full_is_no_damage(own_three, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(checkpoint, "_read_arrays", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        restored(own_three)
    assert steps_in(own_three) == [1, 2, 3]


def test_no_checkpoint_is_none(tmp_path):
    assert restored(tmp_path) is None


def test_progress_comes_back(tmp_path):
    progress = {"interval": [{"loss": 0.1 + 0.2}], "latest": {"test/loss": float("inf")}, "evaluated": False}
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, make_state(1), identity=IDENTITY, progress=progress)
    assert restored(tmp_path).progress == progress


def test_unfinished_save_is_not_a_checkpoint_and_is_removed(own_three):
    (own_three / "4.orbax-checkpoint-tmp").mkdir()
    assert restored(own_three).step == 3
    saved(own_three, steps=(4,))
    assert not list(own_three.glob("*tmp*"))


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.save(1, make_state(1), identity=IDENTITY)
        assert not checkpoints.save(1, make_state(2), identity=IDENTITY)
    assert checksums(restored(tmp_path).state) == checksums(make_state(1))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_every_way_out_waits_for_the_save(error, tmp_path):
    def interrupted():
        with Checkpoints(str(tmp_path)) as checkpoints:
            checkpoints.save(1, make_state(1), identity=IDENTITY)
            raise error(3)

    with pytest.raises(error) as raised:
        interrupted()
    assert raised.value.args == (3,)
    assert steps_in(tmp_path) == [1]
    assert restored(tmp_path).step == 1


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path):
    """The next step writes over the state while it is still being saved and its checksums are being computed."""
    state = {"x": jnp.zeros((1024, 1024))}
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    expected = []
    with Checkpoints(str(tmp_path), keep_last=5) as checkpoints:
        for number in range(5):
            expected.append(checksums(state))
            checkpoints.save(number, state, identity={})
            state = step(step(state))
    for number in range(5):
        assert read_record(tmp_path / str(number))["checksums"] == expected[number]
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.restore(target(state), identity={}).step == 4


def test_compression_is_a_switch(tmp_path):
    state = {"x": jnp.zeros((256, 1024))}
    sizes = []
    for compress in (True, False):
        with Checkpoints(str(tmp_path / str(compress)), compress=compress) as checkpoints:
            checkpoints.save(1, state, identity={})
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(compress)).rglob("*") if path.is_file()))
        with Checkpoints(str(tmp_path / str(compress))) as checkpoints:
            assert checkpoints.restore(target(state), identity={}).step == 1
    assert sizes[0] < 2**20 < sizes[1]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"best_mode": "best"}, {"on_error": "ignore"}])
def test_bad_options(options, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.\w+ must be"):
        Checkpoints(str(tmp_path), **options)


def test_opens_on_another_number_of_devices(tmp_path):
    """Saved on eight devices, each leaf spread out; restored on eight, four and one."""
    devices = jax.devices()
    assert len(devices) == 8, "this test needs several devices"
    state = {"params": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}

    def spread(count):
        return NamedSharding(jax.sharding.Mesh(np.asarray(devices[:count]), ("data",)), PartitionSpec("data"))

    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, jax.device_put(state, spread(8)), identity={}, about=ABOUT)
    for count in (8, 4, 1):
        with Checkpoints(str(tmp_path)) as checkpoints:
            found = checkpoints.restore(target(state, spread(count)), identity={}).state
        assert found["params"]["kernel"].sharding.num_devices == count
        assert checksums(found) == checksums(state)


# ---------------------------------------------------------------------------------------------------------- retention


def test_keeps_the_last_the_best_and_multiples_over_two_lives(tmp_path):
    top1 = {9: 0.9, 5: float("nan"), 12: float("nan"), 20: 0.9}
    options = dict(keep_last=2, best_metric="test/top1", metrics=lambda step: {"test/top1": top1.get(step, 0.5)})
    saved(tmp_path, steps=range(1, 11), **options)
    assert steps_in(tmp_path) == [9, 10]
    saved(tmp_path, steps=range(11, 21), keep_every_steps=8, **options)
    assert steps_in(tmp_path) == [9, 16, 19, 20]
    with Checkpoints(str(tmp_path), best_metric="test/top1") as checkpoints:
        assert checkpoints.latest_step() == 20
        assert checkpoints.would_be_best({"test/top1": 0.91})
        assert not checkpoints.would_be_best({"test/top1": 0.9})
        assert not checkpoints.would_be_best({"test/top1": float("nan")})
        assert not checkpoints.would_be_best({})


def test_the_best_may_be_the_smallest(tmp_path):
    loss = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0}
    options = dict(best_metric="test/loss", best_mode="min", metrics=lambda step: {"test/loss": loss[step]})
    assert steps_in(saved(tmp_path, steps=loss, keep_last=1, **options)) == [2, 5]


def test_a_best_metric_that_no_evaluation_gives_is_named(tmp_path):
    with (
        Checkpoints(str(tmp_path), best_metric="test/top_1") as checkpoints,
        pytest.raises(ValueError, match=r"checkpoint\.best_metric='test/top_1' is none of test/loss, test/top1"),
    ):
        checkpoints.would_be_best({"test/loss": 1.0, "test/top1": 0.5})


def test_half_deleted_old_steps_go_and_unreadable_ones_stay(own_three, caplog):
    """A kill while an old step was being deleted leaves the first; nobody knows what leaves the second."""
    shutil.rmtree(own_three / "1" / "record")
    record = own_three / "2" / "record" / "record"
    record.write_text(record.read_text().replace("0.", "1.", 1))
    saved(own_three, steps=(4, 5), keep_last=2)
    assert steps_in(own_three) == [2, 4, 5]
    assert "Checkpoint 2: its record does not agree with its checksum. It is kept" in caplog.text


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no_arrays", "no_record", "empty_record"])
def test_damaged_step_is_named_set_aside_and_the_older_one_used(damage, own_three, caplog):
    newest = own_three / "3"
    if damage in ("flip", "truncate", "missing"):
        for file in data_files(own_three, 3):
            raw = bytearray(file.read_bytes())
            if damage == "flip" and len(raw) > 4096:
                raw[len(raw) // 2] ^= 16
                file.write_bytes(raw)
            elif damage == "truncate":
                file.write_bytes(raw[: len(raw) // 2])
            elif damage == "missing" and len(raw) > 4096:
                file.unlink()
    elif damage == "no_arrays":
        shutil.rmtree(newest / "state")
    elif damage == "no_record":
        shutil.rmtree(newest / "record")
    else:
        (newest / "record" / "record").write_text("")
    found = restored(own_three)
    assert (found.step, found.damaged) == (2, [3])
    assert checksums(found.state) == checksums(make_state(2))
    assert "Checkpoint 3 is damaged" in caplog.text
    assert (own_three / "damaged" / "3").is_dir()
    assert steps_in(own_three) == [1, 2]
    saved(own_three, steps=(3,), keep_last=3)  # the run gets there again
    assert checksums(restored(own_three).state) == checksums(make_state(3))


def test_any_damage_falls_back_or_does_not_matter(three, tmp_path):
    rng, fell_back = random.Random(0), 0
    for number in range(30):
        directory = shutil.copytree(three / "checkpoints", tmp_path / str(number))
        damage_one_file(directory / "3", rng, truncate=number % 3 == 2)
        found = restored(directory)
        assert checksums(found.state) == checksums(make_state(found.step))
        fell_back += found.step == 2
    assert 0 < fell_back < 30


def test_all_damaged_is_an_error_and_changes_nothing(own_three):
    for step in (1, 2, 3):
        for file in data_files(own_three, step):
            file.write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in own_three.rglob("*")}
    with pytest.raises(OSError, match=r"None of the checkpoints 3, 2, 1 in .* is whole\. Nothing was changed"):
        restored(own_three)
    assert {path: path.stat().st_mtime_ns for path in own_three.rglob("*")} == before


def test_a_record_speaks_for_its_own_step_only(own_three):
    """A folder that was renamed, or copied over another."""
    (own_three / "3").rename(own_three / "7")
    assert restored(own_three).step == 2


def test_no_key_of_the_record_can_change_unseen(own_three):
    path = own_three / "3" / "record" / "record"
    sealed = json.loads(path.read_text())
    assert read_record(own_three / "3") == sealed["record"]
    for key in sealed["record"]:
        path.write_text(json.dumps({**sealed, "record": {**sealed["record"], key: "other"}}))
        with pytest.raises(OSError, match="record"):
            read_record(own_three / "3")


# ----------------------------------------------------------------------------------------------------------- mismatch


def test_another_identity_is_refused_and_not_passed_over(own_three):
    with pytest.raises(CheckpointMismatch, match=r"run\.seed: checkpoint 0, now 1"):
        restored(own_three, identity={**IDENTITY, "run.seed": 1})
    shutil.rmtree(own_three / "3" / "state")  # nor is it when the newest is damaged
    with pytest.raises(CheckpointMismatch, match=r"run\.seed: checkpoint 0, now 1"):
        restored(own_three, identity={**IDENTITY, "run.seed": 1})
    assert steps_in(own_three) == [1, 2, 3]


def test_every_other_shape_and_dtype_is_named(own_three):
    state = make_state(0)
    other = {
        **state,
        "params": {"kernel": jnp.zeros((64, 31)), "half": jnp.zeros((5,)), "new": jnp.zeros(1)},
        "opt_state": ({}, {}),
    }
    with pytest.raises(CheckpointMismatch) as error:
        restored(own_three, other)
    rows = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert rows == [
        "opt_state/0/mu: checkpoint [[64, 32], 'float32'], now absent",
        "params/half: checkpoint [[5], 'bfloat16'], now [[5], 'float32']",
        "params/kernel: checkpoint [[64, 32], 'float32'], now [[64, 31], 'float32']",
        "params/new: checkpoint absent, now [[1], 'float32']",
    ]


# ------------------------------------------------------------------------------------------------------ saves that fail


@pytest.fixture
def small_disk(tmp_path):
    with small_file_system(tmp_path / "small", num_kib=512) as place:
        if place is None:
            pytest.skip("mounting a small file system needs permissions")
        yield place


def big_state(step):
    return {"x": jax.random.bits(jax.random.key(step), (150, 256))}  # 150 KiB that cannot be compressed


def test_full_disk_stops_the_run_and_spares_the_others(small_disk):
    def fill():
        with Checkpoints(str(small_disk), keep_last=9) as checkpoints:
            for step in range(9):
                checkpoints.save(step, big_state(step), identity={})
                checkpoints.wait()

    message = r"Checkpoint 2 could not be written to .*: No space left on device\. The other checkpoints \(0, 1\) are"
    with pytest.raises(SaveFailed, match=message):
        fill()
    found = read_newest(small_disk, target(big_state(0)), identity={})
    assert found.step == 1
    assert checksums(found.state) == checksums(big_state(1))


def test_full_disk_that_is_found_at_the_end(small_disk):
    state = {str(number): big_state(number) for number in range(4)}
    with pytest.raises(SaveFailed, match="No space left on device"), Checkpoints(str(small_disk)) as checkpoints:
        checkpoints.save(1, state, identity={})


def test_the_error_of_the_run_is_not_hidden_by_one_of_the_save(small_disk, caplog):
    state = {str(number): big_state(number) for number in range(4)}

    def both():
        with Checkpoints(str(small_disk)) as checkpoints:
            checkpoints.save(1, state, identity={})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        both()
    assert "Checkpoint 1 could not be written" in caplog.text


def test_full_disk_may_let_the_run_go_on(small_disk, caplog):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(400 * 1024))
    with Checkpoints(str(small_disk), on_error="continue") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, big_state(step), identity={})
            checkpoints.wait()
        filler.unlink()
        assert checkpoints.save(3, big_state(3), identity={})
    assert caplog.text.count("The run goes on (checkpoint.on_error='continue')") == 2
    assert steps_in(small_disk) == [3]


def test_the_last_save_must_not_fail(small_disk):
    (small_disk / "filler").write_bytes(bytes(400 * 1024))

    def fill():
        with Checkpoints(str(small_disk), on_error="continue") as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, big_state(step), identity={})

    with pytest.raises(SaveFailed, match="Checkpoint 2 could not be written"):
        fill()


def test_a_failed_save_is_noticed_before_the_next(small_disk):
    (small_disk / "filler").write_bytes(bytes(400 * 1024))
    checkpoints = Checkpoints(str(small_disk))
    checkpoints.save(1, big_state(1), identity={})

    def go_on():
        with checkpoints:
            while True:
                checkpoints.check()

    with pytest.raises(SaveFailed):
        go_on()


def test_a_failed_save_deletes_nothing_old(small_disk):
    """Orbax decides what to delete before it knows whether the save will succeed."""
    saved = big_state(1)
    with Checkpoints(str(small_disk), keep_last=1, on_error="continue") as checkpoints:
        checkpoints.save(1, saved, identity={})
        checkpoints.wait()
        filler = small_disk / "filler"
        filler.write_bytes(bytes(200 * 1024))
        checkpoints.save(2, big_state(2), identity={})
        checkpoints.wait()
        assert steps_in(small_disk) == [1]
        filler.unlink()
        checkpoints.save(3, big_state(3), identity={})
    assert steps_in(small_disk) == [3]


def fail_to_write(monkeypatch):
    def sealed(record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sealed", sealed)


def test_a_failed_save_does_not_wait_for_the_other_processes(tmp_path, monkeypatch):
    """They wait for this one's part of the checkpoint, and nobody would notice for twenty minutes."""
    met = []
    monkeypatch.setattr(
        checkpoint.multihost, "get_barrier_sync_fn", lambda **_: lambda **_: met.append(sys.exc_info()[1])
    )
    fail_to_write(monkeypatch)
    checkpoints = Checkpoints(str(tmp_path))
    try:
        raise KeyError  # a save after an error is one like any other
    except KeyError:
        checkpoints.save(1, make_state(1), identity={})

    def go_on():
        with checkpoints:
            while True:
                checkpoints.check()

    with pytest.raises(SaveFailed, match="No space left on device"):
        go_on()
    assert {type(error) for error in met} == {KeyError}


def test_the_last_save_of_several_processes_must_not_fail_either(tmp_path, monkeypatch):
    def run():
        with Checkpoints(str(tmp_path)) as checkpoints:
            checkpoints.save(1, make_state(1), identity={})
            monkeypatch.setattr(jax, "process_count", lambda: 2)

    fail_to_write(monkeypatch)
    with pytest.raises(SaveFailed, match="Checkpoint 1 could not be written"):
        run()


def test_a_record_that_one_process_cannot_read_is_the_best_one_for_none(own_three, monkeypatch):
    """Otherwise one of them saves a new best checkpoint, and waits for the others for ever."""

    @contextlib.contextmanager
    def agreed(doing):
        yield
        if doing.endswith("checkpoint 2"):
            raise OSError(f"{doing} failed in process 1")

    monkeypatch.setattr(distributed, "agreed", agreed)
    with Checkpoints(str(own_three), best_metric="test/top1") as checkpoints:
        assert checkpoints.would_be_best({"test/top1": 0.5})


# ----------------------------------------------------------------------------------------------------- parameters only


def test_load_params_gives_all_that_is_needed_to_use_them(three):
    found = load_params(three)
    assert (found.step, found.class_names, found.preprocessing) == (3, ("cat", "dog"), ABOUT["preprocessing"])
    assert found.config == ABOUT["config"]
    assert found.metrics == {"test/top1": 0.0}
    assert set(found.params) == {"kernel", "half"}
    for name, value in make_state(3)["params"].items():
        assert isinstance(found.params[name], np.ndarray)
        assert found.params[name].dtype == value.dtype
        np.testing.assert_array_equal(found.params[name], value)


def test_load_params_of_a_step_and_of_the_best(three):
    assert load_params(three, step=1).step == 1
    assert load_params(three, step="best").step == 2
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 7 below .*; there are: 1, 2, 3"):
        load_params(three, step=7)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint below"):
        load_params(three / "checkpoints")
    with pytest.raises(ValueError, match=r"no moving average.*run\.ema_decay"):
        load_params(three, ema=True)


def test_load_params_of_a_moving_average(tmp_path):
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.zeros(3)}, "ema": {"w": jnp.ones(3)}}, identity={}, about=ABOUT)
    assert load_params(tmp_path, ema=True).params["w"].tolist() == [1, 1, 1]
    assert load_params(tmp_path).params["w"].tolist() == [0, 0, 0]


def test_load_params_reads_no_optimiser_state(tmp_path):
    """Damages the bytes of the moments alone."""
    state = {"params": {"w": jnp.arange(5000.0)}, "opt_state": {"mu": jnp.full(5000, 1.5)}}
    with Checkpoints(str(tmp_path / "checkpoints"), compress=False) as checkpoints:
        checkpoints.save(1, state, identity={}, about=ABOUT)
    damaged = 0
    for file in data_files(tmp_path / "checkpoints", 1):
        raw = file.read_bytes()
        moments = np.full(5000, 1.5, np.float32).tobytes()
        damaged += moments in raw
        file.write_bytes(raw.replace(moments, moments[:-4] + b"\0\0\0\0"))
    assert damaged
    assert load_params(tmp_path).params["w"].tolist() == list(range(5000))
    with (
        pytest.raises(OSError, match="None of the checkpoints 1"),
        Checkpoints(str(tmp_path / "checkpoints")) as checkpoints,
    ):
        checkpoints.restore(target(state), identity={})


def test_load_params_passes_over_what_is_damaged_and_changes_nothing(three, own_three, caplog):
    workdir = own_three.parent
    shutil.rmtree(own_three / "3" / "state")
    (own_three / "4.orbax-checkpoint-tmp").mkdir()  # of a run that is training meanwhile
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert load_params(workdir).step == 2
    assert "Checkpoint 3 is damaged" in caplog.text
    with pytest.raises((OSError, ValueError)):
        load_params(workdir, step=3)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
