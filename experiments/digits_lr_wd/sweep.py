"""Does the best learning rate for digits depend on the weight decay?

Hypothesis   the best lr is the same for every weight decay between 0.01 and 0.3, because AdamW decouples them
Decides      test/top1, mean over two seeds
Budget       24 points of 20 epochs
"""

BASE = "configs/digits.py"


def sweep():
    for weight_decay in (0.01, 0.05, 0.3):
        for lr in (3e-4, 1e-3, 3e-3, 1e-2):
            for seed in (0, 1):
                yield {
                    "optim.lr": lr,
                    "optim.weight_decay": weight_decay,
                    "run.seed": seed,
                    "run.data_seed": 0,
                    "run.total_epochs": 20.0,
                }


def metrics():
    return ["test/top1", "-test/loss"]
