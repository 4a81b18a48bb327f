"""A checkpoint opens on another number of devices and on another mesh, and the run goes on as if nothing happened."""

import jax
import numpy as np
import pytest

from tests.helpers import spread_config
from vit_flax.checkpoint import Checkpoints
from vit_flax.checksums import checksums, differences
from vit_flax.job import build
from vit_flax.trainer import restore_or_init

SAVED_ON = dict(data=1, fsdp=4, tensor=2)
SAVED_AT, STEPS = 4, 6


def job_on(num_devices, **mesh):
    return build(spread_config().to_dict() | dict(mesh=mesh), jax.devices()[:num_devices])


def go_on(job, state, steps):
    """The state after some more steps, and their losses."""
    step, batches, losses = job.train_step(), job.train_batches(int(state.step)), []
    for _ in range(steps):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of six steps on eight devices with a checkpoint after the fourth: folder, checksums then, losses after."""
    folder, job = str(tmp_path_factory.mktemp("elastic")), job_on(8, **SAVED_ON)
    with Checkpoints(folder) as checkpoints:
        state, _ = go_on(job, restore_or_init(job, checkpoints).state, SAVED_AT)
        checkpoints.save(SAVED_AT, state, identity=job.identity())
    sums = checksums(state)
    return folder, sums, go_on(job, state, STEPS - SAVED_AT)[1]


@pytest.mark.parametrize(
    ("num_devices", "mesh"),
    [(4, dict(data=2, tensor=2)), (2, dict(fsdp=2)), (1, dict())],
)
def test_checkpoint_of_eight_devices_goes_on_elsewhere(saved, num_devices, mesh):
    folder, sums, losses = saved
    job = job_on(num_devices, **({"data": -1} | mesh))
    with Checkpoints(folder) as checkpoints:
        restored = restore_or_init(job, checkpoints)
    assert restored.step == SAVED_AT
    assert differences(checksums(restored.state), sums) == {}
    kernel = restored.state.params["blocks"]["mlp"]["fc1"]["kernel"]
    parts = job.mesh.shape["fsdp"] * job.mesh.shape["tensor"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // parts}
    assert len(kernel.addressable_shards) == num_devices
    np.testing.assert_allclose(go_on(job, restored.state, STEPS - SAVED_AT)[1], losses, rtol=1e-5)


def test_batches_do_not_depend_on_the_mesh():
    """Those of the steps after the checkpoint are equal, row by row."""
    eight, two = job_on(8, **SAVED_ON).train_batches(SAVED_AT), job_on(2, data=1, tensor=2).train_batches(SAVED_AT)
    for _ in range(2):
        ours, theirs = next(eight), next(two)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
