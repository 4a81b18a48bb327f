# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A Vision Transformer, step by step
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vit-flax/vit_flax/blob/main/experiments/notebooks/01_vit_from_scratch.ipynb)
#
# From a 512x512 picture to class scores, along the equations of *An Image is Worth 16x16 Words*
# ([arXiv:2010.11929](https://arxiv.org/abs/2010.11929)):
#
# 1. cut the picture into 256 patches of 3072 numbers,
# 2. embed each patch, add an embedding of its position,
# 3. put a class token in front,
# 4. twelve encoder blocks: attention and a small network, each with a skip connection,
# 5. read the class token.
#
# Every piece of code shown here is the project's own, printed from the package; nothing is rewritten for the notebook.
# At the end, the same model trains on real scans of handwritten digits.

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
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Code, display
from sklearn.datasets import load_sample_image

import vit_flax
from vit_flax.models import block, encoder, vit
from vit_flax.models.posemb import LearnedPositions


def show_code(thing):
    """The project's own source of a function or class, without its docstring's details."""
    display(Code(inspect.getsource(thing), language="python"))


# %% [markdown]
# ## 0. A picture
#
# 512x512 pixels, three colours, scaled to numbers between -1 and 1. The batch axis comes first: `[b, h, w, c]`.

# %%
photo = load_sample_image("china.jpg")[:, 64:576]  # 427 x 512
photo = np.asarray(jax.image.resize(photo.astype(np.float32), (512, 512, 3), "linear"))
images = jnp.asarray(photo / 127.5 - 1)[None]
plt.figure(figsize=(4, 4))
plt.imshow(photo.astype(np.uint8))
plt.axis("off")
print(images.shape)

# %% [markdown]
# ## 1. Patches
#
# 512 / 32 = 16 patches along each side, so N = 512·512 / (32·32) = 256 patches of 32·32·3 = 3072 numbers.

# %%
show_code(vit.patchify)
patches, grid = vit.patchify(images, 32)
print("patches", patches.shape, "grid", grid)

# %%
fig, axes = plt.subplots(16, 16, figsize=(5, 5))
for ax, patch in zip(axes.flat, patches[0]):
    ax.imshow(np.asarray(patch.reshape(32, 32, 3) / 2 + 0.5))
    ax.axis("off")
fig.suptitle("256 patches, in reading order")
plt.show()

# %% [markdown]
# ## 2. Patch and position embedding
#
# Equation (1). One dense layer maps the 3072 numbers of a patch to the width of the model, 768 (a convolution with a
# kernel and a stride of 32 would compute the same). A learned vector for each of the positions 0..255 is added: without
# it the model could not know where a patch was.

# %%
from configs.vit_from_scratch_512 import get_config

config = get_config("standard")
model = vit_flax.build(config).model
variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
params = variables["params"]
print("patch_embed/kernel", params["patch_embed"]["kernel"].shape, " posemb/table", params["posemb"]["table"].shape)
show_code(LearnedPositions)

# %%
table = np.asarray(params["posemb"]["table"][0])
unit = table / np.linalg.norm(table, axis=1, keepdims=True)
plt.figure(figsize=(4, 3.2))
plt.imshow(unit @ unit.T, cmap="viridis", vmin=-0.2, vmax=1)
plt.colorbar(label="cosine similarity")
plt.title("256 position embeddings before training:\neach is like itself only")
plt.show()

# %% [markdown]
# ## 3. The class token
#
# One more learned vector, the same for every picture, goes in front of the 256 patches. It has nothing to say yet;
# attention will fill it with what the classifier needs.

# %%
show_code(vit.ClassToken)
logits, out = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
print("tokens", out["tokens"].shape, "= class token + 256 patches")

# %% [markdown]
# ## 4. The encoder: twelve blocks
#
# Equations (2) and (3). Each block normalises, lets the tokens attend to each other, adds the result to what was there
# (a skip connection), and does the same with a small network that looks at one token at a time.

# %%
show_code(block.Block)

# %% [markdown]
# ### Multi-head attention
#
# Every token makes a query, a key and a value in each of 12 heads. A token reads the values of all tokens, weighted by
# how well its query fits their keys.

# %%
show_code(block.Attention)

# %%
attentive = model.clone(return_attention=True)
_, looked = jax.jit(lambda v, x: attentive.apply(v, x, train=False))(variables, images)
weights = looked["blocks"]["attention_weights"]
print("attention weights", weights.shape, "= layers, batch, heads, queries, keys")
print("each query's weights sum to", float(weights[0, 0, 0, 0].sum()))
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6))
query = 1 + 10 * 16 + 5  # the patch in row 10, column 5: on the tower
for head, ax in enumerate(axes):
    ax.imshow(np.asarray(weights[0, 0, head, query, 1:].reshape(16, 16)), cmap="magma")
    ax.plot(5, 10, "c+", markersize=10)
    ax.set_title(f"head {head}")
    ax.axis("off")
fig.suptitle(
    "Where one patch (+) looks in the first block, before training:\nat random, but already by likeness", y=1.12
)
plt.show()

# %% [markdown]
# ### The small network
#
# Two dense layers, 768 -> 3072 -> 768, with a GELU between them; the same for every token.

# %%
show_code(block.Mlp)

# %% [markdown]
# ### Twelve of them
#
# `nn.scan` compiles one block and runs it twelve times. The parameters of all blocks lie in one array with a leading
# axis of 12, so compiling takes no longer for 48 layers than for 12. The classifier will read the class token only: the
# last block computes the other tokens' keys and values, and nothing else of them unless you look.

# %%
show_code(encoder.Encoder)
for path, leaf in jax.tree_util.tree_leaves_with_path(params["blocks"]):
    print(f"{'blocks/' + jax.tree_util.keystr(path, simple=True, separator='/'):32} {leaf.shape}")

# %%
norms = jnp.linalg.norm(out["blocks"]["residual"][:, 0], axis=-1)  # [layers, tokens]
plt.figure(figsize=(5, 2.6))
plt.plot(np.arange(1, 13), np.asarray(norms.mean(axis=1)), "o-")
plt.xlabel("block")
plt.ylabel("mean length of a token")
plt.title("Each skip connection adds to what was there")
plt.show()

# %% [markdown]
# ## 5. Classification
#
# Equation (4): normalise, take the class token, one dense layer to the classes. The whole forward pass, as the model
# has it:

# %%
show_code(vit.ViT.__call__)
print("features", out["features"].shape, " logits", logits.shape)
print("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}")

# %% [markdown]
# The head starts with zeros, so an untrained model gives each class the same probability, and the first loss
# is log(10) = 2.30.

# %%
print(np.asarray(jax.nn.softmax(logits[0])))

# %% [markdown]
# ## 6. Training, on real digits
#
# The same code with smaller numbers: 8x8 scans of handwritten digits (1,797 of them travel with scikit-learn), patches
# of 2x2, four blocks. `train` is what the command line calls too. A few epochs here; `configs/digits.py` in full gets
# 98 % in a minute and a half on two cores.

# %%
from configs import digits

config = digits.get_config()
config.run.total_epochs = 40.0
config.optim.warmup_epochs = 4.0
config.evals.test.every_epochs = 8.0
config.checkpoint.every_epochs = 40.0
import tempfile

workdir = tempfile.mkdtemp()
state, results = vit_flax.train(config, workdir)

# %%
import json

with open(f"{workdir}/metrics.jsonl") as file:
    lines = [json.loads(line) for line in file]
losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
tops = [(line["step"], line["test/top1"]) for line in lines if "test/top1" in line]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
left.plot(*zip(*losses))
left.set(xlabel="step", ylabel="training loss")
right.plot(*zip(*tops), "o-")
right.set(xlabel="step", ylabel="accuracy on the held-out 20 %", ylim=(0, 1))
plt.tight_layout()
plt.show()
print(f"accuracy {results['test/top1']:.3f}")

# %% [markdown]
# ## 7. What it learned
#
# The predictions for some held-out scans, and where the model is wrong.

# %%
job = vit_flax.build(config)
batch = next(iter(job.data.eval()))
pixels = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
logits, _ = jax.jit(lambda p, x: job.model.apply({"params": p}, x, train=False))(state.params, pixels)
predicted = np.asarray(jnp.argmax(logits, -1))
order = np.argsort(predicted == batch["label"], kind="stable")[:24]  # mistakes first
fig, axes = plt.subplots(3, 8, figsize=(8, 4.2))
for ax, i in zip(axes.flat, order):
    ax.imshow(batch["image"][i, :, :, 0], cmap="gray_r")
    right_one = predicted[i] == batch["label"][i]
    ax.set_title(f"{predicted[i]}", color="black" if right_one else "crimson", fontsize=10)
    ax.axis("off")
fig.suptitle("Predictions on held-out digits; mistakes first, in red")
plt.tight_layout()
plt.show()
