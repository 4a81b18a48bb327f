"""The smallest config that goes through every part."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import digits


def tiny_config(**overrides: object) -> ConfigDict:
    """Digits on a model of one block and a width of 8; ten steps. Overrides are dotted keys with __ for the dot."""
    config = digits.get_config()
    config.model.update(dict(width=8, depth=2, mlp_dim=16, num_heads=2, drop_path=0.1))
    del config.run["total_epochs"]
    config.run.update(dict(total_steps=10, log_every_steps=2))
    config.data.update(dict(train_split="train[:300]", batch_size=64, eval_batch_size=64))
    del config.optim["warmup_epochs"]
    config.optim.warmup_steps = 2
    config.checkpoint = dict(every_steps=4, keep_last=2, best_metric="test/top1")
    config.evals = dict(test=dict(type="classification", every_steps=5))
    for key, value in overrides.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


class Changed:
    """The batches of a run, each changed by `change(number, batch)` (from 0), which may also raise."""

    def __init__(self, batches: Any, change: Callable[[int, Any], Any]):
        self._batches, self._change, self._number = batches, change, -1

    def __iter__(self) -> "Changed":
        return self

    def __next__(self) -> Any:
        self._number += 1
        return self._change(self._number, next(self._batches))

    @property
    def counts(self) -> dict[str, Any]:
        return self._batches.counts


class Cut(Changed):
    """The batches of a run, and an error in place of batch number `after`."""

    def __init__(self, batches: Any, after: int, error: BaseException | type[BaseException]):
        def change(number: int, batch: Any) -> Any:
            if number == after:
                raise error
            return batch

        super().__init__(batches, change)


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
        if "init" not in config:  # a checkpoint brings its own sizes
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


def spread_config(**overrides: object) -> ConfigDict:
    """Masks per row, mixed rows, an average, an evaluation that does not divide; a mesh to set."""
    config = tiny_config(run__ema_decay=0.9, optim__lr=1e-2, checkpoint__every_steps=4)
    config.model.update(dict(width=32, mlp_dim=64, num_heads=4, dropout=0.1, drop_path=0.2))
    config.model.update(dict(head_zero_init=False, posemb="learned", class_token=True, registers=1))
    config.model.attention_impl = "xla"  # as on accelerators; the CPU's own form makes one axis of batch and heads
    config.augment = dict(mean=(0.5,), std=(0.5,), mixup_alpha=0.5)
    # The keys' biases have a gradient of zero but for rounding, which Adam would blow up to whole updates.
    config.optim.update(dict(eps=1e-3, warmup_steps=0))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    for key, value in overrides.items():
        section, name = key.split("__")
        config[section][name] = value
    return config
