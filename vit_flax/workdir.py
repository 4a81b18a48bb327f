"""The folder of one run: who may write in it, which experiment it holds, and where things are.

config.json     the resolved config, the versions of the packages and the state of the git checkout
metrics.jsonl   one JSON object a line
report.html     the run in one page, written at its end; from facts.json, evals/ and pictures/, too
checkpoints/    one folder per step
bad_batches/    batches whose loss or gradient was not finite (run.dump_bad_batches)
lock            host and process that are writing
"""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vit_flax.checksums import differences, rows_of
from vit_flax.config import Config, ConfigError, flatten, plain
from vit_flax.files import as_json, write_atomically

log = logging.getLogger(__name__)

PACKAGES = ("vit_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")

# What is measured, not what is trained: may differ between two lives of one run, which then says so.
EVALUATED = ("data.eval_split", "data.eval_transforms")
# What may differ between two lives of one run: it changes neither the parameters nor the data that they are trained on.
MAY_CHANGE = (
    *EVALUATED,
    "run.log_every_steps",
    "mesh.",
    "run.dump_bad_batches",
    "run.log_every_epochs",
    "run.peak_tflops",
    "run.profile_steps",
    "sinks.",
    "checkpoint.",
    "evals.",
    "data.num_threads",
    "data.num_workers",
    "data.decode_once",
    "data.eval_batch_size",
    "data.on_error",  # as long as it was "raise", nothing was skipped
    "data.source.data_dir",
    "data.source.download",
    "data.source.root",  # the pictures may move: the identity has a digest of their paths below it and of the labels
)


class InUse(RuntimeError):
    """Another process holds the workdir."""


def path(given: str | Path) -> Path:
    """The folder that a user means: no shell expands the `~` of `--workdir=~/runs/a`."""
    return Path(given).expanduser().absolute()


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this process; two writers in one folder would destroy each other's checkpoints.

    Raises: InUse: another process holds it; names host and process. OSError: it cannot be made, written or locked.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "a+")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise OSError(
            f"The workdir {workdir} cannot be written ({error.strerror}: {error.filename}). "
            "Choose a --workdir that is, or can become, a folder of yours."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise InUse(f"{workdir} is in use by {owner}. Wait for it, stop it, or choose another --workdir.") from None
        except OSError as error:
            raise OSError(
                f"The file system of the workdir {workdir} has no locks ({error.strerror}), so nothing would keep a "
                "second process out of it. Mount it with them (Lustre: -o flock), or choose another --workdir."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of a config that make an experiment what it is."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(MAY_CHANGE)}


def completed(workdir: Path, config: Config) -> Config | None:
    """What an earlier life of the run made of the same config with a checkpoint; None if there was no such life.

    Keys that may change have the values that they are given now. So a run that started from a checkpoint can go on, and
    be evaluated, without that checkpoint.
    """
    try:
        record = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        now = as_json(plain(config))
        if "init" not in record["given"] or _to_complete(record["given"]) != _to_complete(now):
            return None
        before = record["config"]
        data = {**now["data"], **{key: before["data"][key] for key in ("train_transforms", "eval_transforms")}}
        return _tuples({**now, "data": data, **{name: before[name] for name in ("init", "model", "augment")}})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `check` says what is wrong with it


def _to_complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's completion depends on: its filter goes into `data.eval_transforms`, too."""
    return {**identity(given), "data.eval_transforms": given["data"]["eval_transforms"]}


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def claim(workdir: Path, config: Mapping[str, Any], *, given: Mapping[str, Any]) -> None:
    """Writes config.json, where there is none, where it describes the same experiment, or one that never took a step.

    Args:
      workdir: of the run.
      config: as it is run.
      given: as the user wrote it, before a checkpoint completed it.

    Raises: ConfigError: as `check`.
    """
    before = _read(workdir)
    if before is not None and _changed(before, config) and not _has_trained(workdir):
        before = None
    else:
        check(workdir, config)
    record = {"config": config, "given": given, "versions": versions(), "git": git_state(), "command": sys.argv}
    if before is not None:
        _warn_of_changes(before, as_json(record))
    write_atomically(workdir / "config.json", json.dumps(record, indent=2) + "\n")


def _warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Names what differs between two records of one experiment, where it may show in the numbers."""
    measured = [_evaluated(record["config"]) for record in (before, now)]
    both = sorted(measured[0].keys() & measured[1].keys())
    theirs, ours = ({key: values[key] for key in both} for values in measured)
    found = {
        "other software (%s): from here on its numbers may differ.": differences(before["versions"], now["versions"]),
        "another evaluation (%s): figures from before and from now on cannot be compared.": differences(theirs, ours),
    }
    for message, changed in found.items():
        if changed:
            rows = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items())
            log.warning("This run goes on with " + message, rows)


def _evaluated(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what the figures of the evaluations mean."""
    flat = flatten(config)
    splits = {
        f"evals.{name}.split": section.get("split", "data.eval_split")
        for name, section in config.get("evals", {}).items()
    }
    return {key: flat[key] for key in EVALUATED if key in flat} | splits


def _has_trained(workdir: Path) -> bool:
    """Whether there is anything of a step that was taken; a run that fails before its first one saves step 0."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    return (metrics.exists() and metrics.stat().st_size > 0) or any(
        place.name not in ("0", "replaced") for place in (checkpoints.iterdir() if checkpoints.is_dir() else ())
    )


def check(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json holds; None if there is none. Changes nothing.

    Raises: ConfigError: the workdir holds another experiment, and names the keys that differ; or files of a run without
      a config.json.
    """
    record = _read(workdir)
    if record is not None and (changed := _changed(record, config)):
        raise ConfigError(
            f"{workdir} holds another experiment; these keys differ:\n"
            + rows_of(changed, "there", "here")
            + "\nChoose another --workdir, or run the config that is there. Nothing was changed."
        )
    return record


def _changed(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return differences(identity(record["config"]), identity(as_json(config)))


def _read(workdir: Path) -> dict[str, Any] | None:
    file = workdir / "config.json"
    if not file.exists():
        foreign = [name for name in ("metrics.jsonl", "report.html") if (workdir / name).exists()]
        # Of a run with checkpoints, their records say what it is: only its config.json got lost.
        if foreign and not any((workdir / "checkpoints").glob("[0-9]*")):
            raise ConfigError(
                f"{workdir} has {' and '.join(foreign)}, but no config.json that says what run they are of. "
                "Restore it, or choose another --workdir. Nothing was changed."
            )
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        identity(record["config"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error!r}). Restore it, or choose another --workdir.") from None
    return record


def places(workdir: Path) -> dict[str, Path]:
    """Where a user finds what a run wrote."""
    return {
        "config": workdir / "config.json",
        "metrics": workdir / "metrics.jsonl",
        "report": workdir / "report.html",
        "checkpoints": workdir / "checkpoints",
    }


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
