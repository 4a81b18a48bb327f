"""Bad steps: counted, reported one step late, kept to look at, and fatal after too many in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_flax.bad_steps import BadSteps, Diverged


def metrics(in_a_row: int) -> dict:
    bad = float("nan") if in_a_row else 1.0
    return {
        "loss": jnp.float32(bad),
        "grad_norm": jnp.float32(bad),
        "update_norm": jnp.float32(1),
        "param_norm": jnp.float32(1),
        "skipped_in_a_row": jnp.int32(in_a_row),
    }


def batch(step: int) -> dict:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("data",))
    image = np.full((8, 2, 2, 1), step, np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None]
    return {"image": jax.device_put(image, NamedSharding(mesh, PartitionSpec("data")))}


def watch(folder, said, **options):
    return BadSteps(**{"max_in_a_row": 3, "max_dumps": 0, "folder": folder / "bad", "say": said.append, **options})


def test_says_which_step_and_why_and_goes_on(tmp_path):
    said = []
    bad_steps = watch(tmp_path, said)
    for step, in_a_row in enumerate((0, 1, 0, 1, 2, 0), start=1):
        bad_steps(step, batch(step), metrics(in_a_row))
    bad_steps.flush()
    assert [line.partition(" changed")[0] for line in said] == ["Step 2", "Step 4", "Step 5"]
    assert said[2] == "Step 5 changed nothing: loss nan, grad_norm nan (2 in a row)."
    assert not (tmp_path / "bad").exists()


def test_looks_one_step_late(tmp_path):
    """So that the device, which is busy with the next one, never waits for the host."""
    said = []
    bad_steps = watch(tmp_path, said)
    bad_steps(1, batch(1), metrics(1))
    assert said == []
    bad_steps(2, batch(2), metrics(0))
    assert len(said) == 1


def test_ends_the_run_after_too_many_in_a_row(tmp_path):
    bad_steps = watch(tmp_path, [])
    for step in (7, 8, 9):
        bad_steps(step, batch(step), metrics(step - 6))
    with pytest.raises(
        Diverged,
        match=r"3 steps in a row, up to step 9, were not finite .*\n.*another --workdir.*run\.dump_bad_batches=3",
    ):
        bad_steps(10, batch(10), metrics(0))


def test_the_last_step_of_a_run_counts_too(tmp_path):
    bad_steps = watch(tmp_path, [], max_in_a_row=1)
    bad_steps(1, batch(1), metrics(1))
    with pytest.raises(Diverged):
        bad_steps.flush()


def test_keeps_the_first_batches(tmp_path):
    bad_steps = watch(tmp_path, [], max_dumps=2)
    for step in (7, 8):
        bad_steps(step, batch(step), metrics(step - 6))
    bad_steps(9, batch(9), metrics(3))
    with pytest.raises(Diverged, match=f"The batches are in {tmp_path / 'bad'}"):
        bad_steps.flush()
    assert sorted(path.name for path in (tmp_path / "bad").iterdir()) == ["step_7.npz", "step_8.npz"]
    np.testing.assert_array_equal(np.load(tmp_path / "bad" / "step_8.npz")["image"], batch(8)["image"])


def test_takes_its_own_number_out_of_the_metrics(tmp_path):
    found = metrics(1)
    watch(tmp_path, [])(1, batch(1), found)
    assert "skipped_in_a_row" not in found
