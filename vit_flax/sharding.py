"""The device mesh, and where the state and the batch lie on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_flax.typing import PyTree


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices (of all processes) on one axis, "data"."""
    devices = jax.devices() if devices is None else devices
    # Auto: Linen's dropout cannot make its masks under Explicit axes.
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays that are cut along their first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def state_sharding(abstract: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for each leaf of a state: replicated."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), abstract)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, global_batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that this process holds."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (global_batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array that this process holds, in their order: what `put_batch` was given."""
    shards: list[Any] = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
