"""What a config would train: parameters, arithmetic, memory and steps, without training."""

import json
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vit_flax.job import Job, build
from vit_flax.models.flops import forward_flops
from vit_flax.typing import PyTree

MIB = 2**20


def dry_run(config: Any) -> None:
    """Prints the tables for a config. Raises ConfigError as `job.build` does."""
    job = build(config)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(json.dumps(job.config, indent=2), highlight=False, markup=False)
    console.print(_parameter_table(jax.eval_shape(job.init).params))
    console.print(_facts_table(job))


def _parameter_table(params: PyTree) -> Table:
    """One row per module, with the shapes of its parameters."""
    modules: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        module, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        modules[module].append((name, leaf))
    table = Table("module", "parameters", "shapes", title="Parameters", title_justify="left")
    for module, leaves in modules.items():
        shapes = "  ".join(f"{name} {list(leaf.shape)}" for name, leaf in leaves)
        table.add_row(module, f"{sum(leaf.size for _, leaf in leaves):,}", shapes)
    table.add_row("total", f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}", "", style="bold")
    return table


def _facts_table(job: Job) -> Table:
    abstract = jax.eval_shape(job.init)
    batch = jax.eval_shape(lambda: _fake_batch(job))
    memory = job.train_step().lower(abstract, batch).compile().memory_analysis()
    h, w, c = job.data.image_shape
    ph, pw = (job.model.patch_size,) * 2 if isinstance(job.model.patch_size, int) else job.model.patch_size
    flops = forward_flops(job.model, (h // ph, w // pw), channels=c)
    table = Table(show_header=False, box=None, title="Run", title_justify="left")
    table.add_row("image", f"{h}x{w}x{c}, {h // ph * (w // pw)} patches of {ph}x{pw}")
    table.add_row("forward pass", f"{flops / 1e9:,.3f} GFLOP per image; a training step takes three times that")
    table.add_row("examples", f"{job.data.num_train:,} for training, {job.data.num_classes} classes")
    epochs = job.run.total_steps * job.data.batch_size / job.data.num_train
    table.add_row("steps", f"{job.run.total_steps:,} of {job.data.batch_size} images = {epochs:,.1f} epochs")
    parts = {"parameters": abstract.params, "optimiser": abstract.opt_state, "moving average": abstract.ema}
    sizes = "  ".join(f"{name} {_mib(tree)}" for name, tree in parts.items() if tree is not None)
    table.add_row("memory", f"{sizes}  activations and gradients {memory.temp_size_in_bytes / MIB:,.1f} MiB")
    table.add_row("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}")
    return table


def _fake_batch(job: Job) -> dict[str, jax.Array]:
    b = job.data.batch_size
    zeros = {"image": np.zeros((b, *job.data.image_shape), np.uint8)}
    labels = {"label": np.zeros((b,), np.int32), "mask": np.ones((b,), bool)}
    return jax.tree.map(jax.numpy.asarray, zeros | labels)


def _mib(tree: PyTree) -> str:
    leaves = [x for x in jax.tree.leaves(tree) if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return f"{sum(x.size * x.dtype.itemsize for x in leaves) / MIB:,.1f} MiB"
