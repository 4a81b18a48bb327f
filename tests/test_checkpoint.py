"""Checkpoints: nothing wrong is ever restored, and what is wrong is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.checkpoint import CheckpointMismatch, Checkpoints
from vit_flax.checksums import checksums

IDENTITY = {"model.width": 8, "run.seed": 0}


def make_state(step: int) -> dict:
    """Every kind of leaf that a TrainState has."""
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "params": {"kernel": jax.random.normal(key, (64, 32)), "half": jnp.full((5,), step, jnp.bfloat16)},
        "flag": jnp.array([True, False]),
        "key": key,
    }


def target(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def saved(directory, steps=(1, 2, 3), **options):
    with Checkpoints(str(directory), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), identity=IDENTITY, metrics={"test/top1": 1.0 - abs(step - 2)})
    return directory


def restored(directory, like=None, identity=IDENTITY):
    with Checkpoints(str(directory)) as checkpoints:
        found = checkpoints.restore(target(like or make_state(0)), identity=identity)
        return found and found.state


def test_newest_comes_back_bit_for_bit(tmp_path):
    state = restored(saved(tmp_path))
    assert checksums(state) == checksums(make_state(3))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, make_state(3))


def test_no_checkpoint_is_none(tmp_path):
    assert restored(tmp_path) is None


def test_keeps_the_last_and_the_best(tmp_path):
    saved(tmp_path, steps=(1, 2, 3, 4, 5), keep_last=2, best_metric="test/top1")
    assert {int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()} == {2, 4, 5}


def test_checksum_sees_one_flipped_bit_and_two_exchanged_values():
    state = make_state(1)
    kernel = np.asarray(state["params"]["kernel"]).copy()
    plain = checksums({"x": jnp.asarray(kernel)})
    flipped = kernel.copy()
    flipped.view(np.uint32)[10, 10] ^= 1
    swapped = kernel.copy()
    swapped[0, 0], swapped[0, 1] = kernel[0, 1], kernel[0, 0]
    assert checksums({"x": jnp.asarray(flipped)}) != plain
    assert checksums({"x": jnp.asarray(swapped)}) != plain


# Orbax leaves coroutines behind when a read fails.
after_failed_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@after_failed_reads
@pytest.mark.parametrize("damage", ["flip", "truncate", "half_deleted"])
def test_damaged_step_is_named_and_the_older_one_used(damage, tmp_path, caplog):
    saved(tmp_path, keep_last=3)
    data = max((p for p in (tmp_path / "3" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 16
        data.write_bytes(raw)
    elif damage == "truncate":
        data.write_bytes(raw[: len(raw) // 2])
    else:
        data.unlink()
    state = restored(tmp_path)
    assert checksums(state) in (checksums(make_state(2)), checksums(make_state(3)))
    if checksums(state) == checksums(make_state(2)):
        assert "Checkpoint 3 is damaged" in caplog.text


@after_failed_reads
def test_all_damaged_is_an_error_and_deletes_nothing(tmp_path):
    saved(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        for path in (tmp_path / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with pytest.raises(OSError, match=r"None of the checkpoints 3, 2, 1"):
        restored(tmp_path)
    assert all((tmp_path / str(step)).is_dir() for step in (1, 2, 3))


def test_another_identity_is_refused_and_not_passed_over(tmp_path):
    with pytest.raises(CheckpointMismatch, match=r"run\.seed: checkpoint 0, now 1"):
        restored(saved(tmp_path), identity={**IDENTITY, "run.seed": 1})


def test_another_shape_or_dtype_is_named(tmp_path):
    saved(tmp_path)
    state = make_state(0)
    with pytest.raises(CheckpointMismatch, match=r"params/kernel: checkpoint \[\[64, 32\], 'float32'\]"):
        restored(tmp_path, {**state, "params": {**state["params"], "kernel": jnp.zeros((64, 31))}})
    with pytest.raises(CheckpointMismatch, match="params/half"):
        restored(tmp_path, {**state, "params": {**state["params"], "half": jnp.zeros((5,))}})


def test_unfinished_save_is_not_a_checkpoint(tmp_path):
    saved(tmp_path)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    assert int(restored(tmp_path)["step"]) == 3


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.save(1, make_state(1), identity=IDENTITY)
        assert not checkpoints.save(1, make_state(2), identity=IDENTITY)


def test_leaving_by_an_exception_waits_for_the_save(tmp_path):
    def interrupted():
        with Checkpoints(str(tmp_path)) as checkpoints:
            checkpoints.save(1, make_state(1), identity=IDENTITY)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert int(restored(tmp_path)["step"]) == 1


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"best_mode": "best"}])
def test_bad_options(options, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\."):
        Checkpoints(str(tmp_path), **options)
