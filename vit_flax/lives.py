"""Processes that train, end in every way, and are compared with a run that nothing disturbed.

For `vit_flax.reliability` and the tests. The processes are forked from one that has imported everything, so that a life
takes a second or two.
"""

import contextlib
import copy
import dataclasses
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vit_flax.checkpoint import Checkpoints, read_newest
from vit_flax.checksums import checksums
from vit_flax.job import build
from vit_flax.train_log import CLOCK
from vit_flax.trainer import restore_or_init

PRELOAD = (
    "vit_flax.lives",
    "vit_flax.trainer",
    "vit_flax.cache",
    "vit_flax.dry_run",
    "grain",
    "tensorboardX",
    "sklearn.datasets",
)

WAIT_SECS, END_SECS = 120, 300  # for something to happen in a life, and for its end


def small_config(total_steps: int) -> dict[str, Any]:
    """Digits on two narrow blocks, with everything that a resumed run could lose: average, dropout, best checkpoint."""
    return {
        "run": dict(seed=0, total_steps=total_steps, log_every_steps=7, ema_decay=0.9),
        "data": dict(
            source=dict(name="digits"),
            train_split="train",
            eval_split="test",
            batch_size=16,
            eval_batch_size=64,
            train_transforms=[dict(op="decode", channels=1)],
            eval_transforms=[dict(op="decode", channels=1)],
        ),
        "model": dict(
            num_classes=10,
            patch_size=2,
            width=8,
            depth=2,
            mlp_dim=16,
            num_heads=2,
            pool="gap",
            dropout=0.1,
            drop_path=0.1,
        ),
        "augment": dict(mean=[0.5], std=[0.5], affine=dict(rotate_degrees=15.0), mixup_alpha=0.2, cutmix_alpha=0.0),
        "loss": dict(name="softmax_xent", label_smoothing=0.1),
        "optim": dict(name="adamw", lr=1e-2, weight_decay=0.05, schedule="cosine", warmup_steps=10, clip_norm=1.0),
        "checkpoint": dict(every_steps=5, keep_last=2, best_metric="test/top1"),
        "evals": dict(test=dict(type="classification", every_steps=30)),
    }


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a config with other values; the keys have __ for the dot."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


@dataclasses.dataclass
class Life:
    """One process of a run: `python -m vit_flax.main` with its output in a file."""

    process: Any
    output: Path

    def said(self, text: str) -> bool:
        """Whether the process has printed this."""
        return self.output.exists() and text in self.output.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits for something, or for the end of the process; whether it happened."""
        deadline = time.monotonic() + WAIT_SECS
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self.process.is_alive():
                return condition()
            time.sleep(0.002)
        return False

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self) -> int:
        """Waits for the end; the exit status, or minus the number of the signal."""
        self.process.join(END_SECS)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"Process {self.process.pid} did not end:\n{self.last_words()}")
        return self.process.exitcode

    def last_words(self) -> str:
        """The end of what the process printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")[-3000:] if self.output.exists() else ""


class Lives:
    """Starts processes that train, in a folder of their own.

    Args:
      folder: for configs, output, workdirs and compiled programs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._count = 0

    def start(self, workdir: Path, config: dict[str, Any], *arguments: str) -> Life:
        """Starts the command for a config in a workdir."""
        self._count += 1
        file = self.folder / f"config_{self._count}.py"
        file.write_text(
            f"import json\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
            f"    return ConfigDict(json.loads({json.dumps(config)!r}))\n"
        )
        output = self.folder / f"output_{self._count}.txt"
        argv = ["vit_flax.main", "--config", str(file), "--workdir", str(workdir), *arguments]
        process = self._context.Process(target=_live, args=(argv, str(output)))
        process.start()
        return Life(process, output)


def _live(argv: list[str], output: str) -> None:
    """What a process does: the command line, with its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = argv
    runpy.run_module("vit_flax.main", run_name="__main__", alter_sys=True)


class Reference:
    """The checksums of the state after every step, and the metrics, of a run that nothing disturbed.

    Attributes:
      config: of the run.
      sums: number of steps taken -> checksums of the state.
      workdir: of the run; has its last three checkpoints.
      metrics: its metrics.jsonl.
    """

    def __init__(self, lives: Lives, config: dict[str, Any]):
        self.config, self._total_steps = config, config["run"]["total_steps"]
        job = build(config)
        self._target, self._identity = job.abstract_state(), job.identity()
        self.sums: list[dict[str, int]] = []
        with tempfile.TemporaryDirectory() as empty, Checkpoints(empty) as checkpoints:
            state = restore_or_init(job, checkpoints).state
        step, batches = job.train_step(), job.train_batches(0)
        for _ in range(self._total_steps):
            self.sums.append(checksums(state))
            state, _ = step(state, next(batches))
        self.sums.append(checksums(state))
        self.workdir = lives.folder / "straight"
        life = lives.start(self.workdir, changed(config, checkpoint__keep_last=3))
        if life.end() != 0:
            raise RuntimeError(f"The undisturbed run failed:\n{life.last_words()}")
        self.metrics = metrics_of(self.workdir)
        if not self.is_end_of(self.workdir):
            raise RuntimeError("The undisturbed run and a bare loop over its step end with different bits")

    def read(self, workdir: Path) -> tuple[int, bool, int] | None:
        """Step of the newest whole checkpoint, whether its bits are right, and how many newer ones are damaged."""
        found = read_newest(workdir / "checkpoints", self._target, identity=self._identity)
        if found is None:
            return None
        return found.step, checksums(found.state) == self.sums[found.step], len(found.damaged)

    def is_end_of(self, workdir: Path) -> bool:
        """Whether a run ended with the bits and wrote the metrics of the undisturbed one."""
        return self.read(workdir) == (self._total_steps, True, 0) and metrics_of(workdir) == self.metrics


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def keep_compiled_programs(folder: Path) -> None:
    """Every process, this one too, finds there what another one has compiled."""
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # Processes that are killed cannot tidy up their semaphores; the tracker does, and need not say so.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
