"""What happens between steps: things that are due every so often."""

from collections.abc import Callable
from typing import Any

from vit_flax.step import TrainState

Hook = Callable[..., None]


class Every:
    """Calls `action(step, state)` after every so many steps, and after the last one.

    Args:
      action: what to do.
      every_steps: 0 or None means only after the last step.
      total_steps: number of the last step.
    """

    def __init__(self, action: Callable[[int, TrainState], Any], *, every_steps: int | None, total_steps: int):
        self._action, self._every, self._total = action, every_steps, total_steps

    def __call__(self, step: int, state: TrainState) -> None:
        """Acts if this step is due."""
        if step == self._total or (self._every and step % self._every == 0):
            self._action(step, state)
