"""What a config would train: parameters and their places, arithmetic, memory and communication, without training.

The training step is compiled and not run, so the devices need not be there: `--virtual_devices 8` compiles for eight
CPUs on a laptop, and `--topology v5e:2x4` for eight TPU chips with the real TPU compiler (`pip install libtpu`).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from vit_flax import sharding
from vit_flax.chips import CHIPS, GIB
from vit_flax.collectives import Collective, collectives
from vit_flax.config import ConfigError
from vit_flax.job import Job, build
from vit_flax.tree_paths import by_path
from vit_flax.typing import PyTree
from vit_flax.writer import print_groups

MIB = 2**20


def dry_run(config: Any, topology: str | None = None) -> None:
    """Prints the tables for a config.

    Args:
      config: as in `job.build`.
      topology: TPU chips to compile for, such as "v5e:2x4"; None for the devices that are here.

    Raises: ConfigError: as `job.build`, or a topology that cannot be compiled for.
    """
    job = build(config, tpu_topology(topology) if topology else None)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(json.dumps(job.config, indent=2), highlight=False, markup=False)
    console.print(_parameter_table(job))
    print_groups(console, job.parameter_groups(job.abstract_state().params))
    console.print(_facts_table(job))
    try:
        compiled = compile_step(job)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        console.print(_does_not_fit(str(error).splitlines()[0]), highlight=False, markup=False, soft_wrap=True)
        return
    console.print(_memory_table(job, compiled))
    console.print(_communication_table(collectives(compiled.as_text(), job.mesh)))
    console.print(fits(job, compiled), highlight=False, markup=False, soft_wrap=True)


def tpu_topology(name: str) -> Sequence[Any]:
    """The chips of a TPU slice that is not here, such as "v5e:2x4" or "v5p:2x2x2"; they can only be compiled for.

    Raises: ConfigError: libtpu is not installed, or there is no such slice.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # a missing library, an unknown name: each has an error of its own
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--topology {name}: {reason}\nIt needs the TPU compiler (pip install libtpu, in the version that "
            "jax[tpu] asks for), and a name such as v5e:2x4, v5e:16x16 or v5p:2x2x2."
        ) from error


def compile_step(job: Job) -> Any:
    """The compiled training step; nothing is allocated."""
    return job.train_step().lower(job.abstract_state(), job.abstract_batch()).compile()


def _parameter_table(job: Job) -> Table:
    """One row per parameter; those that the blocks of a loop have alike in one."""
    params = by_path(job.abstract_state().params)
    alike = Counter(re.sub(r"block_\d+", "block_*", path) for path in params)
    shown = {re.sub(r"block_\d+", "block_*", path): leaf for path, leaf in params.items()}
    several = job.mesh.size > 1
    table = Table("parameter", "shape", "number", title="Parameters", title_justify="left")
    if several:
        table.add_column("cut along")
        table.add_column("MiB per device", justify="right")
    for path, leaf in shown.items():
        times = f"{alike[path]} x " if alike[path] > 1 else ""
        row = [path, f"{times}{list(leaf.shape)}", f"{alike[path] * leaf.size:,}"]
        if several:
            cut = [axis if axis and job.mesh.shape[axis] > 1 else "-" for axis in leaf.sharding.spec]
            own = alike[path] * sharding.bytes_per_device(leaf, leaf.sharding)
            row += [", ".join(cut) if set(cut) - {"-"} else "whole", f"{own / MIB:,.3f}"]
        table.add_row(*row)
    total = sum(leaf.size for leaf in params.values())
    last = [f"{_own(job.abstract_state().params) / MIB:,.3f}"] if several else []
    table.add_row("total ", "", f"{total:,}", *([""] if several else []), *last, style="bold")
    return table


def _facts_table(job: Job) -> Table:
    h, w, c = job.data.image_shape
    ph, pw = job.model.patch_shape
    table = Table(show_header=False, box=None, title="Run", title_justify="left")
    table.add_row("image", f"{h}x{w}x{c}, {h // ph * (w // pw)} patches of {ph}x{pw}")
    table.add_row(
        "forward pass", f"{job.forward_flops() / 1e9:,.3f} GFLOP per image; a training step takes three times that"
    )
    splits = dict.fromkeys(job.evaluated.values() or [job.data])  # in the order of the evaluations
    evaluated = ", ".join(f"{len(data.eval_source):,}" for data in splits)
    examples = f"{job.data.num_train:,} for training, {evaluated} for evaluation"
    table.add_row("examples", f"{examples}; {job.data.num_classes} classes")
    epochs = job.run.total_steps * job.data.batch_size / job.data.num_train
    table.add_row("steps", f"{job.run.total_steps:,} of {job.data.batch_size} images = {epochs:,.1f} epochs")
    mesh = " x ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items())
    devices = job.mesh.devices.flat
    processes = len({device.process_index for device in devices})
    where = "one process" if processes == 1 else f"{processes} processes"
    table.add_row("devices", f"{job.mesh.size} x {devices[0].device_kind} in {where}; {mesh}")
    return table


def _memory_table(job: Job, compiled: Any) -> Table:
    state, memory = job.abstract_state(), compiled.memory_analysis()
    table = Table(show_header=False, box=None, title="Memory per device", title_justify="left")
    parts = {"parameters": state.params, "optimiser": state.opt_state, "moving average": state.ema}
    for name, tree in parts.items():
        if tree is not None:
            table.add_row(name, f"{_own(tree) / MIB:12,.1f} MiB")
    gradients = _own(state.params)
    rest = memory.temp_size_in_bytes - gradients
    table.add_row("gradients", f"{gradients / MIB:12,.1f} MiB")
    table.add_row("activations", f"{max(rest, 0) / MIB:12,.1f} MiB  with gathered layers and workspace")
    table.add_row("in all", f"{needed_bytes(compiled) / MIB:12,.1f} MiB  as compiled, with the batch", style="bold")
    return table


def _communication_table(found: Sequence[Collective]) -> Table:
    """Per kind, mesh axes and place: how often in a step, and what one device sends."""
    table = Table("between devices", "along", "where", title="Communication per step", title_justify="left")
    table.add_column("times", justify="right")
    table.add_column("MiB of arrays", justify="right")
    table.add_column("MiB sent per device", justify="right")
    rows: dict[tuple[str, str, str], list[float]] = {}
    for c in found:
        where = "in a loop" if c.in_loop else "once"
        row = rows.setdefault((c.kind, " x ".join(c.axes) or "parts of axes", where), [0, 0, 0])
        for i, value in enumerate((c.times, c.times * c.num_bytes, c.times * c.sent_bytes)):
            row[i] += value
    for key, (times, whole, sent) in sorted(rows.items(), key=lambda item: -item[1][2]):
        table.add_row(*key, f"{times:,}", f"{whole / MIB:,.3f}", f"{sent / MIB:,.3f}")
    if not rows:
        table.add_row("none", "", "", "0", "0", "0")
    return table


def needed_bytes(compiled: Any) -> int:
    """Memory of one device while the step runs: its arguments, results that take no argument's place, and the rest."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def fits(job: Job, compiled: Any) -> str:
    """One line: whether the step fits the memory of the devices."""
    device = job.mesh.devices.flat[0]
    needed, limit = needed_bytes(compiled), memory_limit(device, job.mesh.size)
    if limit is None:
        return f"Needs {needed / GIB:,.2f} GiB; how much a {device.device_kind} has is not known here."
    num_bytes, what = limit
    if needed > num_bytes:
        return _does_not_fit(f"needs {needed / GIB:,.2f} GiB of {num_bytes / GIB:,.2f} GiB {what}")
    return f"Fits: {needed / GIB:,.2f} GiB of {num_bytes / GIB:,.2f} GiB {what}."


def _does_not_fit(reason: str) -> str:
    return (
        f"DOES NOT FIT: {reason}.\nWhat helps: a larger mesh.fsdp, model.remat='dots' or 'full', run.accumulate_steps, "
        "a smaller data.batch_size, model.dtype='bfloat16'."
    )


def memory_limit(device: Any, num_devices: int) -> tuple[int, str] | None:
    """Bytes that a program may use on one of the devices, and what they are; None where nobody knows."""
    if device.platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host // num_devices, f"(the memory of this host, shared by {num_devices})"
    stats = device.memory_stats() if device in jax.devices() else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], f"that JAX may use of a {device.device_kind}"
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind].memory_bytes, f"of a {device.device_kind} by its data sheet"
    return None


def _own(tree: PyTree) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s on one device."""
    return sharding.bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))
