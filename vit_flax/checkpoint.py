"""Checkpoints: the state of a run, and a record that says what it is and proves that it is whole; nothing foreign.

    checkpoints/<step>/state     the arrays, by Orbax
    checkpoints/<step>/record    one JSON file: checksums of all leaves, identity and description of the run, metrics
    checkpoints/damaged/<step>   what was found damaged and passed over
    checkpoints/replaced/0       of a run that failed before its first step, and was started again as another one

Orbax writes a step to a temporary folder and renames it, so a kill during a save leaves no partial step. It has no
checksum for array data, however, it reads its own JSON files unchecked, and it deletes in place. So nothing is used
that does not agree with the checksums of a record that agrees with its own; what does not is named, and passed over for
the next older step. docs/reliability.md has the promises, their limits, and how they were tested.
"""

import contextlib
import dataclasses
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import multihost

from vit_flax import distributed
from vit_flax.checkpoint_record import (
    RECORD,
    RecordHandler,
    RecordSave,
    read_record,
    sealed,
    steps_in,
)
from vit_flax.checksums import checksums, differences, leaf_sums, rows_of, shapes
from vit_flax.files import as_json, write_atomically
from vit_flax.optim import eval_params_of, kept_by_schedule_free
from vit_flax.orbax_noise import quieten
from vit_flax.retention import Keep
from vit_flax.tree_paths import by_path
from vit_flax.typing import PyTree

log = logging.getLogger(__name__)


class SaveFailed(OSError):
    """A checkpoint could not be written; those before it are intact."""


class CheckpointMismatch(ValueError):
    """The checkpoint is whole, but not of the run or of the kind that was asked for."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run goes on from.

    Attributes:
      step: of the checkpoint.
      state: on the devices, as the target described it.
      progress: what `save` was given under that name.
      damaged: newer checkpoints, which were passed over.
    """

    step: int
    state: PyTree
    progress: dict[str, Any]
    damaged: Sequence[int] = ()


class Checkpoints:
    """The checkpoints of one run: one writer, under the lock of the workdir.

    Args:
      directory: holds one folder per step.
      keep_last: the newest so many are never deleted.
      keep_every_steps: multiples of this stay for ever.
      best_metric: the checkpoint with the best value of this metric stays, such as "test/top1"; the first of equals.
      best_mode: "max" or "min".
      on_error: what a save that fails does to the run: "stop" it, or "continue" and try again at the next save. A final
        save that fails is an error either way.
      compress: zstd; 8 % smaller on the random bits of trained weights, and several times slower to write.

    Raises: ValueError: an option outside its values.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "max",
        on_error: str = "stop",
        compress: bool = True,
    ):
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be 1 or more, got {keep_last}.")
        if best_mode not in ("max", "min"):
            raise ValueError(f"checkpoint.best_mode must be 'max' or 'min', got {best_mode!r}.")
        if on_error not in ("stop", "continue"):
            raise ValueError(f"checkpoint.on_error must be 'stop' or 'continue', got {on_error!r}.")
        quieten()
        self.directory = Path(directory).absolute()
        self._on_error, self._compress = on_error, compress
        self._policy = Keep(keep_last, keep_every_steps, best_metric, best_mode)
        for step in distributed.from_main(steps_in(self.directory)):
            try:
                with distributed.agreed(f"reading the record of checkpoint {step}"):
                    metrics = read_record(self.directory / str(step))["metrics"]
                self._policy.metrics[step] = metrics  # where all can read it: they have to agree on the best one
            except FileNotFoundError:
                continue  # half deleted by a process that was killed: may go
            except OSError as error:
                self._policy.unreadable.add(step)
                log.error("Checkpoint %s: %s. It is kept, but not considered for the best one.", step, error)
        self._writing: int | None = None
        self._failed: SaveFailed | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        self._broken = False  # a thread that saves has met an error
        return ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=self._compress),
                RECORD: RecordHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # reads none of the files that may be damaged
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._barrier(threading.current_thread())),
            ),
        )

    def _barrier(self, caller: threading.Thread) -> Callable[..., None]:
        """How the threads that save wait for other processes: not after an error, or a failed save holds all for long.

        Orbax lets them meet once more, while the others wait for this one's part of the checkpoint: twenty minutes.
        """
        meet = multihost.get_barrier_sync_fn()

        def barrier(*, key: str, timeout_ms: int) -> None:
            error = sys.exc_info()[1]
            if error is not None and threading.current_thread() is not caller:
                self._broken = True
                raise error
            meet(key=key, timeout_ms=timeout_ms)

        return barrier

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        identity: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts writing a checkpoint; returns once the state is copied, so that its buffers may be donated.

        Args:
          step: its name.
          state: to save.
          identity: what must be the same for a run to go on from here; as everything below, JSON values.
          about: what a reader wants to know: `config`, `class_names`, `preprocessing`.
          metrics: of an evaluation of this very state.
          progress: what the next process needs besides the state; `restore` hands it back.

        Returns: False if that step exists already, or if it could not be written and `on_error` is "continue".
        Raises: SaveFailed: this save, or the one before, where `on_error` is "stop".
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        record = {
            "step": step,
            "identity": dict(identity),
            "about": dict(about or {}),
            "metrics": dict(metrics or {}),
            "progress": dict(progress or {}),
            "shapes": shapes(state),
        }
        sums = leaf_sums(state)  # dispatched; the thread that writes the record waits for it

        def text() -> str:
            values = by_path(jax.tree.map(int, jax.device_get(sums)))
            return sealed({**record, "checksums": values})

        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=RecordSave(text))
        self._policy.metrics[step] = record["metrics"]
        self._writing = step
        try:
            return self._manager.save(step, args=args, force=True)
        except (ValueError, OSError) as error:
            self._save_failed(error)
            return False

    def amend(self, step: int, *, metrics: Mapping[str, float], progress: Mapping[str, Any]) -> None:
        """Replaces what a checkpoint says about its step, when the evaluations at it were finished later."""
        self.wait()
        path = self.directory / str(step)
        with distributed.agreed(f"amending checkpoint {step}"):
            record = {**read_record(path), "metrics": dict(metrics), "progress": dict(progress)}
            if distributed.is_main():
                write_atomically(path / RECORD / RECORD, sealed(record))
        self._policy.metrics[step] = record["metrics"]

    def would_be_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be kept as the best one."""
        return self._policy.would_be_best(metrics)

    def latest_step(self) -> int | None:
        """Number of the newest checkpoint."""
        return self._manager.latest_step()

    def restore(self, target: PyTree, *, identity: Mapping[str, Any]) -> Restored | None:
        """The newest state that is whole and belongs to this run; None if there is no checkpoint at all.

        Steps that are damaged are named, and moved to `damaged/` once a whole one is found.

        Args:
          target: shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct`s).
          identity: as in `save`.

        Raises:
          CheckpointMismatch: a checkpoint was made by another run; names every difference. That of step 0 is moved to
            `replaced/` instead.
          OSError: there are checkpoints, and none is whole; nothing was changed.
        """
        try:
            restored = read_newest(self.directory, target, identity=identity)
        except CheckpointMismatch:
            if self.latest_step() != 0:
                raise
            self._set_aside([0], "replaced")  # nothing was trained: it is of a run that failed before its first step
            return None
        if restored is not None:
            self._set_aside(restored.damaged, "damaged")
        return restored

    def _set_aside(self, steps: Sequence[int], why: str) -> None:
        """Moves steps to the folder `why`, where they can be looked at, so that the run may write them anew."""
        for step in steps:
            with distributed.agreed(f"moving checkpoint {step} away"):
                if distributed.is_main():
                    place = self.directory / why / str(step)
                    while place.exists():
                        place = place.with_name(place.name + "+")
                    place.parent.mkdir(exist_ok=True)
                    (self.directory / str(step)).rename(place)
                    log.error("Moved the %s checkpoint %s to %s.", why, step, place)
            self._policy.forget(step)
        if steps:
            self._manager.reload()

    def check(self) -> None:
        """Reports a save that has failed meanwhile; costs microseconds. Raises SaveFailed as `save` does."""
        if self._broken or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises SaveFailed if it is not and `on_error` is "stop"."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever went wrong in the background
            self._save_failed(error)
        else:
            if self._writing is not None:
                self._writing = self._failed = None

    def _save_failed(self, error: Exception) -> None:
        step, self._writing = self._writing, None
        if jax.process_count() > 1:  # the others may believe that all is well: the job has to end
            raise SaveFailed(f"Checkpoint {step} could not be written to {self.directory}: {_reason(error)}") from error
        self._policy.forget(step)
        # The manager believes that the step exists and that older ones are deleted. A new one reads what is there, and
        # removes what was written of the step, which may be what fills the disk.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()
        intact = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
        self._failed = SaveFailed(
            f"Checkpoint {step} could not be written to {self.directory}: {_reason(error)}. "
            f"The other checkpoints ({intact}) are as they were."
        )
        if self._on_error == "stop":
            raise self._failed from error
        log.error("%s The run goes on (checkpoint.on_error='continue').", self._failed)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Waits until everything is on disk, whatever ended the run. Raises SaveFailed if the last save failed."""
        if jax.process_count() > 1:
            if error is None:  # else the others may be gone, and finishing a save needs them all
                self.wait()
                self._manager.close()
            return
        with contextlib.suppress(SaveFailed):
            self.wait()
        self._manager.close()
        if self._failed is not None and error is None:
            raise self._failed
        if self._failed is not None and self._failed is not error:
            log.error("%s", self._failed)  # beside the error that is on its way


def read_newest(directory: Path, target: PyTree, *, identity: Mapping[str, Any]) -> Restored | None:
    """As `Checkpoints.restore`, but changes nothing on the disk."""

    def read(path: Path, record: Mapping[str, Any]) -> PyTree:
        for what, ours in (("identity", as_json(identity)), ("shapes", shapes(target))):
            if diff := differences(record[what], ours):
                raise CheckpointMismatch(_mismatch(path, what, diff))
        return _read_arrays(path, record, target)

    found = _newest_whole(directory, read)
    if found is None:
        return None
    record, state, damaged = found
    return Restored(record["step"], state, record["progress"], damaged)


@dataclasses.dataclass(frozen=True)
class SavedParams:
    """The parameters of a run, and what is needed to use them.

    Attributes:
      step: that they were saved after.
      params: NumPy arrays.
      config: resolved, as in config.json.
      class_names: one per logit.
      preprocessing: `image_shape` (h, w, c), `transforms` (of the evaluation split), `mean`, `std`.
      metrics: of an evaluation at this step; empty if there was none.
    """

    step: int
    params: dict[str, Any]
    config: dict[str, Any]
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    metrics: dict[str, float]


def load_params(workdir: str | Path, *, step: int | Literal["best"] | None = None, ema: bool = False) -> SavedParams:
    """Loads only the parameters of a run, checked against their checksums: those that its evaluations are of.

    Changes nothing, and may be called while the run is training. Of the optimiser's state it reads what schedule-free
    makes these parameters of, and nothing of any other optimiser's.

    Args:
      workdir: of the run.
      step: one of its checkpoints, or "best" by `checkpoint.best_metric`; None: the newest that is whole.
      ema: their moving average instead.

    Raises:
      FileNotFoundError: no checkpoint, or not that one.
      ValueError: the run keeps no moving average, or has no best checkpoint.
      OSError: damaged.
    """
    root = "ema" if ema else "params"

    def read(path: Path, record: Mapping[str, Any]) -> PyTree:
        leaves = {k: v for k, v in record["shapes"].items() if k.startswith(f"{root}/")}
        if not leaves:
            raise CheckpointMismatch(f"{path} has no moving average of the parameters: the run set run.ema_decay to 0.")
        kept = {} if ema else kept_by_schedule_free(record["shapes"])
        tree = _read_arrays(path, record, _tree_of(leaves | kept))
        return eval_params_of(by_path(tree), tree[root]) if kept else tree[root]

    directory = Path(workdir).expanduser().absolute() / "checkpoints"
    if step is None:
        found = _newest_whole(directory, read)
        if found is None:
            raise FileNotFoundError(f"There is no checkpoint below {workdir}: train first, or check the folder.")
        record, params, _ = found
    else:
        number = _best_step(directory) if step == "best" else step
        path = directory / str(number)
        if not path.is_dir():
            there = ", ".join(map(str, steps_in(directory))) or "none"
            raise FileNotFoundError(f"There is no checkpoint {number} below {workdir}; there are: {there}.")
        record = read_record(path)
        params = read(path, record)
    about = record["about"]
    return SavedParams(
        step=record["step"],
        params=params,
        config=about["config"],
        class_names=tuple(about["class_names"]),
        preprocessing=about["preprocessing"],
        metrics=record["metrics"],
    )


def _best_step(directory: Path) -> int:
    """The best checkpoint by the `best_metric` of the newest one's config. Raises ValueError if there is none."""
    records = {}
    for step in steps_in(directory):
        with contextlib.suppress(OSError):
            records[step] = read_record(directory / str(step))
    options = records[max(records)]["about"]["config"]["checkpoint"] if records else {}
    keep = Keep(1, None, options.get("best_metric"), options.get("best_mode", "max"))
    keep.metrics = {step: record["metrics"] for step, record in records.items()}
    if (best := keep.best(list(records))) is None:
        raise ValueError(f"No checkpoint in {directory} has been evaluated by checkpoint.best_metric.")
    return best


def _newest_whole(
    directory: Path, read: Callable[[Path, dict[str, Any]], PyTree]
) -> tuple[dict[str, Any], PyTree, list[int]] | None:
    """Record and content of the newest checkpoint that `read` can read, and the damaged ones that are newer.

    Raises: OSError: none can be read. CheckpointMismatch: as `read` does.
    """
    quieten()
    steps = distributed.from_main(steps_in(directory))
    damaged: list[int] = []
    for step in reversed(steps):
        path = directory / str(step)
        try:
            with distributed.agreed("reading its record"):
                record = read_record(path)
            return record, read(path, record), damaged
        except (CheckpointMismatch, MemoryError, PermissionError):
            raise
        except Exception as error:  # whatever a damaged file makes the readers raise
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise  # the memory of the device is full; the checkpoint may be whole
            damaged.append(step)
            log.error("Checkpoint %s is damaged (%s): %s", step, _reason(error), path)
    if damaged:
        raise OSError(
            f"None of the checkpoints {', '.join(map(str, damaged))} in {directory} is whole. Nothing was changed; "
            "restore the folder from a backup, or start again in an empty workdir."
        )
    return None


def _read_arrays(path: Path, record: Mapping[str, Any], target: PyTree) -> PyTree:
    """Those arrays of a checkpoint that the target has, where it wants them, checked against the checksums."""
    restore_args = jax.tree.map(_restore_arg, target)
    partial = len(by_path(target)) < len(record["shapes"])
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=partial)
    # The handler itself: Orbax's Checkpointer lets a process that has read wait for one that could not.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader, distributed.agreed("reading the arrays"):
        tree = reader.restore(epath.Path(path / "state"), args=args)
    found = checksums(tree)
    expected = {name: record["checksums"].get(name) for name in found}
    if damaged := differences(expected, found):
        raise OSError(f"the checksum differs in {', '.join(damaged)}")
    return tree


def _restore_arg(leaf: Any) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _tree_of(leaves: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Nested dicts of abstract arrays, from `shapes`."""
    tree: dict[str, Any] = {}
    for path, (shape, dtype) in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, dtype)
    return tree


def _mismatch(path: Path, what: str, diff: Mapping[str, tuple[Any, Any]]) -> str:
    return (
        f"Checkpoint {path.name} in {path.parent} belongs to another run; {len(diff)} differences in {what}:\n"
        + rows_of(diff, "checkpoint", "now")
        + "\nUse another --workdir, or the config that made it."
    )


def _reason(error: Exception) -> str:
    """One line of what may be pages."""
    text = str(error)
    if "No space left on device" in text:
        return "No space left on device"
    first = text.strip().splitlines()[0][:200] if text.strip() else ""
    return f"{type(error).__name__}: {first}"
