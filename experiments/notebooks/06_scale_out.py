# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Scale out: the same step on eight devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vit-flax/vit_flax/blob/main/experiments/notebooks/06_scale_out.ipynb)
#
# Eight virtual devices on one CPU behave like eight chips: the same mesh, the same compiled communication, only slower. What runs
# here runs unchanged on eight GPUs or a TPU slice.

# %%
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("vit_flax") is None:  # on Colab; a checkout that is installed is used as it is
    folder = "vit_flax_checkout"
    extras = "notebooks,convert,gpu" if shutil.which("nvidia-smi") else "notebooks,convert"
    subprocess.run(["git", "clone", "-q", "--depth=1", "https://github.com/vit-flax/vit_flax", folder], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{folder}[{extras}]"], check=True)
    sys.path.insert(0, os.path.abspath(folder))
os.chdir(Path(importlib.util.find_spec("vit_flax").origin).parents[1])  # where configs/ and tests/ are

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # before JAX is used; leave it out where there are real devices

import matplotlib.pyplot as plt
import numpy as np

import vit_flax
from configs import digits
from vit_flax import sharding
from vit_flax.collectives import collectives

print(jax.devices())


# %% [markdown]
# ## A mesh, and where each parameter lies
#
# `data` cuts the batch, `fsdp` also cuts parameters and optimiser, `tensor` cuts heads and hidden units.


# %%
def make(**mesh):
    config = digits.get_config()
    config.mesh = mesh
    return vit_flax.build(config)


job = make(data=2, fsdp=2, tensor=2)
state = job.abstract_state()
for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    print(f"{name:32} {leaf.shape!s:18} {leaf.sharding.spec}")

# %%
kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
array = jax.device_put(np.zeros(kernel.shape, np.float32), kernel.sharding)
jax.debug.visualize_array_sharding(array[0])

# %% [markdown]
# ## Memory per device
#
# FSDP divides parameters and optimiser by the number of devices.

# %%
names = {"data parallel": dict(data=8), "FSDP": dict(data=1, fsdp=8), "2 x 2 x 2": dict(data=2, fsdp=2, tensor=2)}
sizes = {}
for name, mesh in names.items():
    target = make(**mesh).abstract_state()
    places = jax.tree.map(lambda leaf: leaf.sharding, target)
    sizes[name] = sharding.bytes_per_device(target, places) / 2**20
plt.figure(figsize=(5, 2))
plt.barh(list(sizes), list(sizes.values()))
plt.xlabel("MiB of state per device")
plt.show()

# %% [markdown]
# ## What the compiled step communicates

# %%
job = make(data=1, fsdp=8)
state = jax.jit(job.init, out_shardings=jax.tree.map(lambda x: x.sharding, job.abstract_state()))()
batch = next(job.train_batches(0))
compiled = job.train_step().lower(state, batch).compile()
for c in collectives(compiled.as_text(), job.mesh):
    if c.num_bytes > 1024:
        print(f"{c.kind:12} {'+'.join(c.axes):8} {c.num_bytes / 1024:8.0f} KiB x {c.times}  {c.shapes[0]}")

# %% [markdown]
# ## The same numbers as one device

# %%
jobs = {"eight devices, FSDP": job, "one device": vit_flax.build(digits.get_config(), jax.devices()[:1])}
losses = {}
for name, job in jobs.items():
    state = jax.jit(job.init, out_shardings=jax.tree.map(lambda x: x.sharding, job.abstract_state()))()
    step, batches = job.train_step(), job.train_batches(0)
    losses[name] = []
    for _ in range(5):
        state, metrics = step(state, next(batches))
        losses[name].append(float(metrics["loss"]))
for name, values in losses.items():
    print(f"{name:20}", " ".join(f"{value:.6f}" for value in values))
