"""Which pooling and which positions suit a small ViT on digits?

Hypothesis   gap with fixed sincos2d positions leads, as at ImageNet scale in short schedules (arXiv:2205.01580); no
             positions at all lose several points, because strokes are told apart by where they are
Decides      test/top1, mean over two seeds
Budget       18 points of 20 epochs
"""

BASE = "configs/digits.py"


def sweep():
    for pool in ("tok", "gap", "map"):
        for posemb in ("learned", "sincos2d", "none"):
            for seed in (0, 1):
                yield {
                    "model.pool": pool,
                    "model.posemb": posemb,
                    "run.seed": seed,
                    "run.data_seed": 0,
                    "run.total_epochs": 20.0,
                }


def metrics():
    return ["test/top1", "-test/loss"]
