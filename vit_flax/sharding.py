"""The device mesh, and where the state and the batch lie on it: data parallel, FSDP, tensor parallel, and their products.

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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays that are cut along their first axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises a ValueError unless the devices get equal parts of a batch."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise ValueError(
            f"{name}={batch_size} cannot be cut into {parts} equal parts (data x fsdp of {dict(mesh.shape)}): "
            f"choose a multiple of {parts}."
        )


def spec_of(path: str, shape: Sequence[int]) -> tuple[str, PartitionSpec]:
    """The rule for a parameter, and what it makes of that number of dimensions."""
    pattern, axes = next((pattern, axes) for pattern, axes in RULES if re.search(pattern, path))
    return pattern, PartitionSpec(*(None,) * (len(shape) - len(axes)), *axes)


def param_shardings(params: PyTree, mesh: Mesh) -> dict[str, NamedSharding]:
    """Path -> where a parameter lies.

    Raises: ValueError: a mesh axis does not divide a dimension that it cuts; names all of them.
    """
    out, problems = {}, []
    for path, leaf in _by_path(params):
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


def state_sharding(abstract: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for each leaf of a state.

    What the optimiser and the average keep per parameter lies like the parameter: its path ends in the parameter's and
    its shape is the same. Everything else (counters, factored moments) is on every device.

    Args:
      abstract: a state with `params`, as arrays or shapes.
      mesh: see `make_mesh`.

    Raises: ValueError: see `param_shardings`.
    """
    shardings = param_shardings(abstract.params, mesh)
    shapes = {path: leaf.shape for path, leaf in _by_path(abstract.params)}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        param = next((end for end in ends if end in shapes), None)
        return shardings[param] if param and leaf.shape == shapes[param] else everywhere

    leaves, treedef = jax.tree.flatten(abstract)
    paths = [path for path, _ in _by_path(abstract)]
    return jax.tree.unflatten(treedef, [one(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and into how many parts the processes cut it.

    Processes that share the rows of a batch (one tensor-parallel group may span several) read the same part.

    Raises: ValueError: the rows of a process are not one part out of equal ones.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = batch_sharding(mesh).devices_indices_map((parts,))
    own = {index[0].indices(parts)[0] for device, index in rows.items() if device.process_index == jax.process_index()}
    first, size = min(own), len(own)
    if own != set(range(first, first + size)) or first % size or parts % size:
        raise ValueError(
            f"Process {jax.process_index()} holds the parts {sorted(own)} of {parts} of a batch, which are not one part "
            "out of equal ones: choose mesh sizes that the number of devices of a process divides, or that divide it."
        )
    return first // size, parts // size


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that this process holds.

    Raises: ValueError: this process holds another number of rows than its part of the global batch.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (global_batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def keep_batch_cut(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`apply` of a module, with every activation cut along the batch.

    Without it XLA may leave a kernel that is cut along the width where it is, cut the activations likewise and sum
    them up after each product: correct, but no FSDP, and far more bytes. Modules that return one array return one with
    the batch first; that is all that is known of them here.
    """

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


def _by_path(tree: PyTree) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]
