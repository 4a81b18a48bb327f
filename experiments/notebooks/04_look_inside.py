# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Look inside
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vit-flax/vit_flax/blob/main/experiments/notebooks/04_look_inside.ipynb)
#
# Every forward pass returns named intermediates besides the logits: tokens, each block's branches, features, and the attention
# weights on request. What nobody reads costs nothing under `jit`. Here: a small model with learned positions, trained on digits
# for a minute, and what is in it.

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
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import vit_flax
from configs import digits

config = digits.get_config()
config.model.update(dict(posemb="learned", pool="tok"))
config.run.total_epochs = 40.0
config.optim.warmup_epochs = 4.0
config.checkpoint.every_epochs = config.evals.test.every_epochs = 40.0
state, results = vit_flax.train(config, tempfile.mkdtemp())
job = vit_flax.build(config)
batch = next(iter(job.data.eval()))
batch = {name: values[batch["mask"]] for name, values in batch.items()}  # without the padding
pixels = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
print(f"accuracy {results['test/top1']:.3f}")

# %%
model = job.model.clone(return_attention=True)
logits, out = jax.jit(lambda p, x: model.apply({"params": p}, x, train=False))(state.params, pixels)
print(jax.tree.map(jnp.shape, out))

# %% [markdown]
# ## Where the class token looks
#
# 4x4 patches of 2x2 pixels; the mean over the heads of each block.

# %%
weights = out["blocks"]["attention_weights"].mean(axis=2)[:, :, 0, 1:]  # [blocks, b, patches]
depth = weights.shape[0]
fig, axes = plt.subplots(5, depth + 1, figsize=(1.5 * (depth + 1), 7.5))
for row, i in zip(axes, range(0, 50, 10)):
    row[0].imshow(batch["image"][i, :, :, 0], cmap="gray_r")
    for block in range(depth):
        row[block + 1].imshow(np.asarray(weights[block, i].reshape(4, 4)), cmap="magma")
        row[block + 1].set_title(f"block {block + 1}" if i == 0 else "", fontsize=9)
for ax in axes.flat:
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Positions
#
# How alike are the learned positions? Each small square shows one position against all others.

# %%
table = np.asarray(state.params["posemb"]["table"][0])
unit = table / np.linalg.norm(table, axis=1, keepdims=True)
alike = (unit @ unit.T).reshape(4, 4, 4, 4)
fig, axes = plt.subplots(4, 4, figsize=(4, 4))
for r in range(4):
    for c in range(4):
        axes[r, c].imshow(alike[r, c], vmin=-0.5, vmax=1)
        axes[r, c].axis("off")
plt.show()

# %% [markdown]
# ## How far each branch moves the tokens, block by block

# %%
fig, ax = plt.subplots(figsize=(5, 2.6))
for name in ("attention", "mlp", "residual"):
    length = jnp.linalg.norm(out["blocks"][name], axis=-1).mean(axis=(1, 2))
    ax.plot(np.arange(1, depth + 1), np.asarray(length), "o-", label=name)
ax.set(xlabel="block", ylabel="mean length", xticks=range(1, depth + 1))
ax.legend()
plt.show()

# %% [markdown]
# ## The features, in two dimensions

# %%
features = np.asarray(out["features"])
_, _, axes2 = np.linalg.svd(features - features.mean(0), full_matrices=False)
plane = (features - features.mean(0)) @ axes2[:2].T
plt.figure(figsize=(5, 4))
plt.scatter(plane[:, 0], plane[:, 1], c=batch["label"], cmap="tab10", s=12)
plt.colorbar(label="digit")
plt.show()
