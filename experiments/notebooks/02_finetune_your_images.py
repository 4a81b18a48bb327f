# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Fine-tune on your own images
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vit-flax/vit_flax/blob/main/experiments/notebooks/02_finetune_your_images.ipynb)
#
# A folder with one folder of pictures per class is all that is needed. Set `PICTURES` to yours and `CHECKPOINT` to any
# published ViT (`hf://google/vit-base-patch16-224`, a timm folder, an `.npz`, ...). Without a network this notebook makes both: it
# trains a small model on the handwritten digits 0 to 4, and fine-tunes it on pictures of 5 to 9, which it has never seen.

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
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import vit_flax
from configs import digits, finetune
from vit_flax.data.digits import read_digits

PICTURES = None  # "/content/my_pictures"
CHECKPOINT = None  # "hf://google/vit-base-patch16-224"
SIZE_PX = 8  # 224 for most published models
work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Pictures
#
# `FOLDER/<class>/*.png`; a tenth is held out by a hash of each file's path.

# %%
images, labels = read_digits()
if PICTURES is None:
    PICTURES = work / "pictures"
    for i, (image, label) in enumerate(zip(images, labels)):
        if label >= 5:
            folder = PICTURES / f"digit_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").save(folder / f"{i}.png")
files = sorted(Path(PICTURES).glob("*/*"))
fig, axes = plt.subplots(1, 8, figsize=(8, 1.4))
for ax, file in zip(axes, files[:: len(files) // 8]):
    ax.imshow(Image.open(file))
    ax.set_title(file.parent.name, fontsize=8)
    ax.axis("off")
plt.show()
print(len(files), "pictures")

# %% [markdown]
# ## A checkpoint to start from
#
# Any public ViT will do. Here: the digits 0 to 4, trained for a minute.

# %%
if CHECKPOINT is None:
    some = labels < 5
    np.savez(work / "small.npz", train_images=images[some][200:], train_labels=labels[some][200:].astype(np.int32),
             test_images=images[some][:200], test_labels=labels[some][:200].astype(np.int32))  # fmt: skip
    config = digits.get_config()
    config.data.source = dict(name="arrays", path=str(work / "small.npz"))
    colour = [dict(op="decode", channels=3)]
    config.data.update(dict(train_transforms=colour, eval_transforms=colour, eval_batch_size=200))
    config.model.num_classes = 5
    config.run.total_epochs = 30.0
    config.optim.warmup_epochs = 3.0
    config.checkpoint.every_epochs = config.evals.test.every_epochs = 30.0
    vit_flax.train(config, work / "pretrain")
    CHECKPOINT = work / "pretrain"

# %% [markdown]
# ## Fine-tune
#
# `configs/finetune.py` takes the checkpoint, the folder and the size of the pictures. The new head, the position table for
# another size, mean and standard deviation: all follow from the checkpoint, and the report says what became of every tensor.

# %%
config = finetune.get_config(f"{CHECKPOINT},{PICTURES},{SIZE_PX}")
config.run.total_epochs = 20.0
config.optim.lr = 0.01
whole = [dict(op="decode", channels=3), dict(op="resize", size_px=SIZE_PX)]
config.data.update(dict(train_transforms=whole, eval_transforms=whole))  # digits are not to be cropped or mirrored
config.checkpoint.every_epochs = config.evals.test.every_epochs = 10.0
state, results = vit_flax.train(config, work / "finetuned")

# %% [markdown]
# ## Look at the result
#
# The run's folder has a report (`report.html`), and is itself a checkpoint.

# %%
pretrained = vit_flax.load_pretrained(work / "finetuned")
print(pretrained.class_names, f"accuracy {results['test/top1']:.3f}")
chosen = files[:: max(len(files) // 12, 1)][:12]
pixels = jnp.stack([pretrained.preprocess(np.asarray(Image.open(f).convert("RGB"))) for f in chosen])
logits, _ = jax.jit(lambda p, x: pretrained.model.apply({"params": p}, x, train=False))(pretrained.params, pixels)
fig, axes = plt.subplots(1, len(chosen), figsize=(11, 1.6))
for ax, file, row in zip(axes, chosen, np.asarray(logits)):
    ax.imshow(Image.open(file))
    ax.set_title(pretrained.class_names[row.argmax()].replace("digit_", ""), fontsize=9)
    ax.axis("off")
fig.suptitle("Predictions", y=1.05)
plt.show()
