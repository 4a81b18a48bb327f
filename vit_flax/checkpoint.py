"""Checkpoints: the state, a checksum of every leaf, and the identity of the run; nothing foreign.

Orbax writes a step to a temporary folder and renames it, so a kill during a save leaves no partial step. It has no
checksum for array data, however, and deletes in place; so every leaf carries a checksum here, and a step that does not
restore whole is named and passed over for the next older one.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from vit_flax.typing import Array, PyTree

log = logging.getLogger(__name__)


class CheckpointMismatch(ValueError):
    """The checkpoint belongs to another run than the one that wants to go on from it."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: holds one folder per step.
      keep_last: the newest so many are never deleted.
      keep_every_steps: multiples of this stay for ever.
      best_metric: the checkpoint with the best value of this metric stays, such as "test/accuracy".
      best_mode: "max" or "min".
    """

    def __init__(
        self,
        directory: str,
        *,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "max",
    ):
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be 1 or more, got {keep_last}.")
        if best_mode not in ("max", "min"):
            raise ValueError(f"checkpoint.best_mode must be 'max' or 'min', got {best_mode!r}.")
        score = _score(best_metric, best_mode)
        # Orbax's `max_to_keep` with `best_fn` deletes the newest steps; a union of policies does not.
        policies: list[keep.PreservationPolicy] = [keep.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(keep.EveryNSteps(keep_every_steps))
        if score:
            reverse = best_mode == "min"
            policies.append(
                keep.BestN(get_metric_fn=score, reverse=reverse, n=1, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            os.path.abspath(directory),
            options=ocp.CheckpointManagerOptions(
                best_fn=score,  # without it, Orbax does not write the metrics down
                best_mode=best_mode,
                preservation_policy=keep.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self, step: int, state: PyTree, *, identity: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Starts writing a checkpoint; returns once the state is copied, so that its buffers may be donated.

        Args:
          step: its name.
          state: to save.
          identity: what must be the same for a run to go on from here; JSON values.
          metrics: latest evaluation.

        Returns: False if that step exists already.
        Raises: OSError: an earlier save failed, or this one cannot start; earlier steps stay as they are.
        """
        if step in self._manager.all_steps():
            return False
        meta = {"identity": dict(identity), "shapes": _shapes(state), "checksums": checksums(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            return self._manager.save(step, args=args, metrics=dict(metrics or {}), force=True)
        except ValueError as error:  # Orbax reports a failed write of an earlier, asynchronous save here
            raise OSError(f"writing a checkpoint failed: {error}") from error

    def restore(self, target: PyTree, *, identity: Mapping[str, Any]) -> PyTree | None:
        """The newest state that is whole and belongs to this run; None if there is no checkpoint at all.

        Args:
          target: shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct`s).
          identity: as in `save`.

        Raises:
          CheckpointMismatch: a checkpoint was made by another run; names every difference.
          OSError: there are checkpoints, and none is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                self._check_same_run(step, meta, target, identity)
                state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))[
                    "state"
                ]
                if damaged := _differing(meta["checksums"], checksums(state)):
                    raise OSError(f"the checksum differs in {', '.join(list(damaged)[:5])}")
                return state
            except CheckpointMismatch:
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
                log.error("Checkpoint %s is damaged (%s: %s); trying an older one.", step, type(error).__name__, reason)
        if steps:
            raise OSError(
                f"None of the checkpoints {steps} in {self._manager.directory} could be restored. Nothing was changed; "
                "restore the folder from a backup, or start again in an empty workdir."
            )
        return None

    def _check_same_run(self, step: int, meta: dict, target: PyTree, identity: Mapping[str, Any]) -> None:
        for what, ours in (("identity", dict(identity)), ("shapes", _shapes(target))):
            if diff := _differing(meta[what], ours):
                rows = [f"  {key}: checkpoint {theirs!r}, now {now!r}" for key, (theirs, now) in diff.items()]
                raise CheckpointMismatch(
                    f"Checkpoint {step} in {self._manager.directory} belongs to another run; "
                    f"{len(diff)} differences in {what}:\n"
                    + "\n".join(rows[:20])
                    + "\nUse another --workdir, or the config that made it."
                )

    def latest_step(self) -> int | None:
        """Number of the newest checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises OSError if it is not."""
        try:
            self._manager.wait_until_finished()
        except ValueError as error:
            raise OSError(f"writing a checkpoint failed: {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until everything is on disk, whatever ended the run, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _score(metric: str | None, mode: str) -> Callable[[Mapping[str, float]], float] | None:
    if metric is None:
        return None
    worst = -math.inf if mode == "max" else math.inf  # a NaN would break Orbax's ranking

    def score(metrics: Mapping[str, float]) -> float:
        value = metrics.get(metric, math.nan)
        return value if math.isfinite(value) else worst

    return score


@jax.jit
def _leaf_sums(tree: PyTree) -> PyTree:
    """One uint32 per leaf. Sums of integers are exact, so the value is the same on any mesh."""

    def one(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32).ravel()
        index = jnp.arange(words.size, dtype=jnp.uint32)
        # Odd weights that differ from word to word: no single flipped bit and no exchange of two words goes unseen.
        return jnp.sum((words + index * jnp.uint32(0x9E3779B1)) * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def checksums(tree: PyTree) -> dict[str, int]:
    """A checksum of every leaf, by its path."""
    return {path: int(value) for path, value in _named(jax.device_get(_leaf_sums(tree)))}


def _shapes(tree: PyTree) -> dict[str, list]:
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in _named(tree)}


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    absent = "absent"
    return {k: (a.get(k, absent), b.get(k, absent)) for k in sorted({*a, *b}) if a.get(k, absent) != b.get(k, absent)}
