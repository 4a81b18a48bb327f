# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Load a public checkpoint, and check that it is computed exactly
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vit-flax/vit_flax/blob/main/experiments/notebooks/03_load_and_compare_pretrained.ipynb)
#
# Google's, big_vision's, transformers', timm's and Meta's checkpoints load with one call, and the model computes what their own
# library computes. Set `CHECKPOINT` to `hf://google/vit-base-patch16-224` (or a file); without a network a tiny checkpoint of the
# test suite is used, which was written by transformers together with its own answer.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import vit_flax

CHECKPOINT = "tests/golden/hf_ViTForImageClassification"
ANSWER = "tests/golden/hf_ViTForImageClassification.io.npz"  # None where there is none

# %%
pretrained = vit_flax.load_pretrained(CHECKPOINT)
print(pretrained.report)
print(pretrained.model)

# %% [markdown]
# ## The same numbers as the library it comes from

# %%
if ANSWER is not None:
    golden = np.load(ANSWER)
    print({name: golden[name].shape for name in golden})
    name = next(n for n in golden if "image" in n or "pixel" in n)
    with jax.default_matmul_precision("highest"):
        logits, out = pretrained.model.apply({"params": pretrained.params}, jnp.asarray(golden[name]), train=False)
    theirs = next(golden[n] for n in golden if golden[n].shape == logits.shape)
    print("largest difference of the logits:", float(np.abs(logits - theirs).max()))
    plt.figure(figsize=(3.2, 3))
    plt.plot(theirs.ravel(), np.asarray(logits).ravel(), "o", markersize=4)
    plt.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    plt.xlabel("transformers")
    plt.ylabel("vit_flax")
    plt.show()

# %% [markdown]
# ## A photograph of another size
#
# Positions are resampled as the family's own library does it, for rectangles too.

# %%
patch = pretrained.model.patch_size
wide = vit_flax.load_pretrained(CHECKPOINT, image_size=(4 * patch, 6 * patch))
print([line for line in str(wide.report).splitlines() if "resampled" in line])
photo = load_sample_image("flower.jpg")
pixels = wide.preprocess(photo)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4))
left.imshow(photo)
left.set_title(f"{photo.shape[1]} x {photo.shape[0]}")
right.imshow(np.clip((pixels - pixels.min()) / (pixels.max() - pixels.min()), 0, 1))
right.set_title(f"what the model gets: {pixels.shape[1]} x {pixels.shape[0]}")
for ax in (left, right):
    ax.axis("off")
plt.show()

# %% [markdown]
# ## To another library, and back with the same bits

# %%
import tempfile

folder = tempfile.mkdtemp()
vit_flax.save_pretrained(
    folder, pretrained.model, pretrained.params, family="hf", class_names=pretrained.class_names,
    preprocess=pretrained.preprocess,
)  # fmt: skip
again = vit_flax.load_pretrained(folder)
same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), pretrained.params, again.params)
print("all equal:", all(jax.tree.leaves(same)))
