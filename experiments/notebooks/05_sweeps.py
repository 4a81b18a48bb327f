# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Sweeps
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vit-flax/vit_flax/blob/main/experiments/notebooks/05_sweeps.ipynb)
#
# A sweep file is plain Python: a base config, a generator of overrides, the metrics to compare. Its points run one by one, in many
# processes, on Slurm, or, where they differ in numbers only, as **one** program.

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

from rich.console import Console

from vit_flax.sweep import members, page, results, run
from vit_flax.sweep.points import load_sweep

folder = Path(tempfile.mkdtemp())
(folder / "sweep.py").write_text('''
"""Which learning rate for digits, in five epochs?"""

BASE = "configs/digits.py"


def sweep():
    for lr in (5e-4, 2e-3, 8e-3):
        for seed in (0, 1):
            yield {"optim.lr": lr, "run.seed": seed, "run.data_seed": 0, "run.total_epochs": 5.0,
                   "optim.warmup_epochs": 1.0}


def metrics():
    return ["test/top1", "-test/loss"]
''')
sweep = load_sweep(folder / "sweep.py")
for point in sweep.points:
    print(point.index, point.name)

# %% [markdown]
# ## All points as one program
#
# The points differ in learning rate and seed only, so they are members of one program: parameters and optimiser states stacked,
# the numbers traced. Each gets what it would get alone.
#
# On the command line: `python -m vit_flax.sweep --sweep FILE --workdir W --vmap`; without `--vmap`, each point is a process.

# %%
for group in members.group(run.pending(folder, sweep)):
    members.train_members(group, folder)

# %% [markdown]
# ## What it found

# %%
rows = results.collect(folder, sweep)
results.write_csv(folder / "results.csv", rows)
results.print_table(Console(width=110), sweep, rows)
print((folder / "results.csv").read_text()[:400])

# %%
from IPython.display import HTML, display

path = page.write_page(folder, sweep, rows)
display(HTML(f"<iframe srcdoc='{path.read_text().replace(chr(39), '&#39;')}' width=900 height=500></iframe>"))
