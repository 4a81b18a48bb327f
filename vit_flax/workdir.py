"""The folder of one run: who may write in it, which experiment it holds, and where things are.

config.json     the resolved config, the versions of the packages and the state of the git checkout
metrics.jsonl   one JSON object a line
checkpoints/    one folder per step
lock            host and process that are writing
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vit_flax.config import Config, ConfigError, flatten, plain

PACKAGES = ("vit_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")

# What may differ between two lives of one run: it changes neither the parameters nor the data.
MAY_CHANGE = (
    "run.log_every_steps",
    "checkpoint.",
    "evals.",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch_batches",
    "data.source.data_dir",
)


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this process; two writers in one folder would destroy each other's checkpoints.

    Raises: RuntimeError: another process holds it; names host and process.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RuntimeError(
                f"{workdir} is in use by {owner}. Wait for it, stop it, or choose another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of a config that make an experiment what it is."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(MAY_CHANGE)}


def completed(workdir: Path, config: Config) -> Config:
    """The config as an earlier life of the run completed it from a checkpoint, if it was given the same one.

    So a run that started from a checkpoint goes on, and is evaluated, without it.
    """
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text())
        same = "init" in record["given"] and record["given"] == json.loads(json.dumps(plain(config)))
        return _tuples(record["config"]) if same else config
    except (OSError, ValueError, KeyError):
        return config  # `claim` says what is wrong with it


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def claim(workdir: Path, config: Mapping[str, Any], **facts: Any) -> None:
    """Writes config.json, or checks that the one which is there describes the same experiment.

    Args:
      workdir: of the run.
      config: complete.
      **facts: what else to write down.

    Raises: ConfigError: the workdir holds another experiment; names the keys that differ.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            saved = identity(json.loads(path.read_text())["config"])
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read ({error}). Restore it, or choose another --workdir.") from None
        ours = identity(json.loads(json.dumps(config)))
        keys = [k for k in sorted({*saved, *ours}) if saved.get(k, "absent") != ours.get(k, "absent")]
        if keys:
            rows = [f"  {k}: there {saved.get(k, 'absent')!r}, here {ours.get(k, 'absent')!r}" for k in keys[:20]]
            raise ConfigError(
                f"{workdir} holds another experiment; these keys differ:\n"
                + "\n".join(rows)
                + "\nChoose another --workdir, or run the config that is there. Nothing was changed."
            )
    record = {"config": config, **facts, "versions": versions(), "git": git_state(), "command": sys.argv}
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def places(workdir: Path) -> dict[str, Path]:
    """Where a user finds what a run wrote."""
    return {
        "config": workdir / "config.json",
        "metrics": workdir / "metrics.jsonl",
        "checkpoints": workdir / "checkpoints",
    }


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old one or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed as a package"
    return out


def git_state() -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, of the checkout that holds this file; None outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
