"""How sharp is the best learning rate for digits, and how much of the difference is the seed?

Hypothesis   between lr 1e-3 and 4e-3 the seed matters as much as the learning rate
Decides      test/top1, mean over four seeds
Budget       32 points of 20 epochs; they differ in numbers only: --vmap trains them as one program
"""

BASE = "configs/digits.py"


def sweep():
    for lr in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2):
        for seed in range(4):
            yield {"optim.lr": lr, "run.seed": seed, "run.data_seed": 0, "run.total_epochs": 20.0}


def metrics():
    return ["test/top1", "-test/loss"]
