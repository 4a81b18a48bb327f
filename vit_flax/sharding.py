"""The device mesh, and where state and batch lie on it: data parallel, FSDP, tensor parallel, and their products.

The model knows nothing of this: one table of rules, from parameter paths to axes, is applied to the whole state, and
XLA adds the communication (Xu et al. 2021, arXiv:2105.04663; Zhao et al. 2023, arXiv:2304.11277 for FSDP).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vit_flax.tree_paths import by_path, name_of
from vit_flax.typing import PyTree

BATCH_AXES = ("data", "fsdp")  # a batch is cut over both: FSDP is data parallelism whose state is cut up too

# Pattern of a parameter's path -> the mesh axis that cuts each of its last dimensions; the first match wins. Counted
# from the end, so that a rule holds for one block `[d, k, e]` and for stacked ones `[l, d, k, e]`.
# "fsdp" always cuts the width of the model, "tensor" the heads and the hidden units.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", ("tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(fc1|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/(fc1|gate)/bias$", ("tensor",)),
    (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
    (r"patch_embed/kernel$", (None, "fsdp")),
    (r"posemb/table$", ("fsdp",)),
    (r"(head|head_dist|pre_logits)/kernel$", ("fsdp", None)),
    (r"", ()),  # norms, other biases, tokens and scales: small, and read everywhere
)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes, as data x fsdp x tensor.

    Args:
      data: replicas of the state; -1 for "what is left".
      fsdp: devices among which parameters, gradients, optimiser and average are cut up; they share the batch too.
      tensor: devices that share the heads and hidden units of every block. The last axis, so that these are neighbours.
      devices: all there are where it is None.

    Raises: ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0:
        sizes[free[0]] = len(devices) // fixed
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"{data=}, {fsdp=}, {tensor=} do not fit {len(devices)} devices: the product must be that number "
            "(one of them may be -1, for what is left)."
        )
    # Auto: Linen's dropout cannot make its masks under Explicit axes.
    return Mesh(_grid(devices, tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _grid(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices in the order that their links ask for; TPU slices (joined by a slow network) along "data" only."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(f"data={sizes[0]} must be a multiple of the {slices} slices of this TPU job.")
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays that are cut along their first axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def everywhere(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(name: str, batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises a ValueError unless the devices get equal parts of a batch, in each of the `accumulate_steps`."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * accumulate_steps
    if batch_size % parts:
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        accumulated = f" x accumulate_steps {accumulate_steps}" if accumulate_steps > 1 else ""
        raise ValueError(
            f"{name}={batch_size} cannot be cut into {parts} equal parts ({sizes}{accumulated}): "
            f"choose a multiple of {parts}."
        )


def spec_of(path: str, shape: Sequence[int]) -> tuple[str, PartitionSpec]:
    """The rule for a parameter, and what it makes of that number of dimensions."""
    pattern, axes = next((pattern, axes) for pattern, axes in RULES if re.search(pattern, path))
    return pattern, PartitionSpec(*(None,) * (len(shape) - len(axes)), *axes)


def param_shardings(params: PyTree, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Path -> where a parameter lies.

    Raises: ValueError: a mesh axis does not divide a dimension that it cuts; names all of them.
    """
    out, problems = {}, []
    for path, leaf in by_path(params).items():
        _, spec = spec_of(path, leaf.shape)
        problems += [
            f"  mesh.{axis}={mesh.shape[axis]} does not divide dimension {i} of {path} {list(leaf.shape)}"
            for i, axis in enumerate(spec)
            if axis is not None and leaf.shape[i] % mesh.shape[axis]
        ]
        out[path] = NamedSharding(mesh, spec)
    if problems:
        more = [f"  and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise ValueError(
            "\n".join(["the parameters cannot be cut up evenly:", *problems[:8], *more])
            + "\nmesh.fsdp has to divide the model's width, mesh.tensor its heads and hidden units."
        )
    return out


def state_sharding(abstract: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """A sharding for each leaf of a state.

    What the optimiser and the average keep per parameter lies like the parameter: its path ends in the parameter's and
    its shape is the same. Everything else (counters, factored moments) is on every device.

    Args:
      abstract: a state with `params`, as arrays or shapes.
      mesh: see `make_mesh`.

    Raises: ValueError: see `param_shardings`.
    """
    shardings = param_shardings(abstract.params, mesh)
    shapes = {path: leaf.shape for path, leaf in by_path(abstract.params).items()}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = name_of(path).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        param = next((end for end in ends if end in shapes), None)
        return shardings[param] if param and leaf.shape == shapes[param] else everywhere(mesh)

    return jax.tree_util.tree_map_with_path(one, abstract)


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and into how many parts the processes cut it.

    Processes that share the rows of a batch (one tensor-parallel group may span several) read the same part.

    Raises: ValueError: two processes share some of their rows but not all.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    held: dict[int, set[int]] = {}
    for device, (rows, *_) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(rows.indices(parts)[0])
    return _shard_among(held, parts, jax.process_index())


def _shard_among(held: Mapping[int, set[int]], parts: int, process: int) -> tuple[int, int]:
    """`data_shard`, given which of the `parts` of a batch each process holds (not always neighbouring ones)."""
    shards = sorted({tuple(sorted(own)) for own in held.values()})
    if sum(map(len, shards)) > parts or len({len(own) for own in shards}) > 1:
        raise ValueError(
            f"The processes hold these parts of every batch: {dict(held)}. They have to be equal or have none in "
            "common: choose mesh sizes that the number of devices of a process divides, or that divide it."
        )
    return shards.index(tuple(sorted(held[process]))), len(shards)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that this process holds.

    Raises: ValueError: this process holds another number of rows than its part of the global batch.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (global_batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array that this process holds, in their order: what `put_batch` was given."""
    parts = {shard.index[0].start or 0: shard for shard in x.addressable_shards}  # devices may share rows
    return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])


def keep_batch_cut(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`apply` of a module, with every activation cut along the batch.

    Without it XLA may leave a kernel that is cut along the width where it is, cut the activations likewise and sum
    them up after each product: correct, but no FSDP, and far more bytes. Modules that return one array return one with
    the batch first; that is all that is known of them here. On one device there is nothing to cut.
    """
    if mesh.size == 1:
        return apply

    def intercept(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name != "__call__" or not isinstance(out, jax.Array) or out.ndim < 2:
            return out
        spec = PartitionSpec(BATCH_AXES, *(PartitionSpec.UNCONSTRAINED,) * (out.ndim - 1))
        return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, spec))

    def applied(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return apply(*args, **kwargs)

    return applied


def bytes_per_device(abstract: PyTree, shardings: PyTree) -> int:
    """What the leaves of a tree take on one device; random keys are left out."""
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in pairs
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
