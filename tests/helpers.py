"""The smallest config that goes through every part."""

import csv
import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import digits


def tiny_config(**overrides: object) -> ConfigDict:
    """Digits on a model of one block and a width of 8; ten steps. Overrides are dotted keys with __ for the dot."""
    config = digits.get_config()
    config.model.update(dict(width=8, depth=2, mlp_dim=16, num_heads=2, drop_path=0.1))
    del config.run["total_epochs"]
    config.run.update(dict(total_steps=10, log_every_steps=2))
    config.data.update(dict(batch_size=64, eval_batch_size=64))
    del config.optim["warmup_epochs"]
    config.optim.warmup_steps = 2
    config.checkpoint = dict(every_steps=4, keep_last=2, best_metric="test/top1")
    config.evals = dict(test=dict(type="classification", every_steps=5))
    for key, value in overrides.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def metrics_lines(workdir: Path) -> list[str]:
    """metrics.jsonl, without the numbers that depend on the clock."""
    from vit_flax.train_log import CLOCK  # here: a config must not import JAX

    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [json.dumps({k: v for k, v in line.items() if k not in CLOCK}) for line in lines]


def csv_rows(workdir: Path, table: str) -> list[dict[str, str]]:
    """The rows of a table in csv/, without the numbers that depend on the clock."""
    from vit_flax.train_log import CLOCK

    with open(workdir / "csv" / f"{table}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if f"{table}/{k}" not in CLOCK} for row in csv.DictReader(file)]


def shrink(config: ConfigDict) -> ConfigDict:
    """The same experiment with the smallest model and batches, and two steps; every feature that is on stays on."""
    with config.unlocked():
        config.model.update(dict(width=8, depth=2, mlp_dim=16, num_heads=2, head_dim=4))
        config.data.update(dict(batch_size=8, eval_batch_size=8))
        for section in (config.run, config.optim, config.checkpoint, *config.evals.values()):
            for key in [k for k in section if k.endswith("_epochs")]:
                del section[key]
        config.run.update(dict(total_steps=2, log_every_steps=1))
        config.optim.warmup_steps = 1
        config.checkpoint.every_steps = 1
        for section in config.evals.values():
            section.every_steps = 1
    return config
