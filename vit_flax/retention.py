"""Which checkpoints stay."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy


class Keep(preservation_policy.PreservationPolicy):
    """Which checkpoints stay: the last ones, multiples of a number, the best one.

    Orbax's own `max_to_keep` with `best_fn` deletes the newest ones, and its metrics file is read unchecked.

    Attributes:
      metrics: of the checkpoints that have a readable record, by step.
      unreadable: steps whose record is damaged; no policy may delete them.
    """

    def __init__(self, last: int, every: int | None, best_metric: str | None, best_mode: str):
        self._last, self._every, self._metric = last, every, best_metric
        self._sign = 1 if best_mode == "max" else -1
        self.metrics: dict[int, Mapping[str, float]] = {}
        self.unreadable: set[int] = set()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        """Called by Orbax after each save; one answer per checkpoint, oldest first."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._last :], *self.unreadable, self.best(steps)}
        return [step in kept or (self._every is not None and step % self._every == 0) for step in steps]

    def best(self, steps: Sequence[int]) -> int | None:
        """The first of those with the best metric; None if none of them has a finite one."""
        scores = {step: self._score(self.metrics.get(step, {})) for step in sorted(steps)}
        step = max(scores, key=scores.__getitem__, default=None)
        return step if step is not None and scores[step] > -math.inf else None

    def would_be_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics beat those of all checkpoints. Raises ValueError if the metric is not there."""
        evaluation = f"{str(self._metric).partition('/')[0]}/"
        if self._metric not in metrics and any(name.startswith(evaluation) for name in metrics):
            raise ValueError(f"checkpoint.best_metric={self._metric!r} is none of {', '.join(metrics)}.")
        return self._score(metrics) > max(map(self._score, self.metrics.values()), default=-math.inf)

    def forget(self, step: int | None) -> None:
        """The checkpoint is not there any more."""
        self.metrics.pop(step, None)  # type: ignore[arg-type]
        self.unreadable.discard(step)  # type: ignore[arg-type]

    def _score(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(str(self._metric), math.nan)
        return self._sign * value if math.isfinite(value) else -math.inf
