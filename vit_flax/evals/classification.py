"""Accuracy, loss and calibration of a classifier on a split, each example counted once."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from vit_flax import metrics
from vit_flax.step import TrainState
from vit_flax.typing import Array, PyTree


class Classification:
    """Evaluates the parameters (and their moving average, where there is one) on one split.

    Args:
      apply: `(variables, images, train=False) -> (logits, out)`.
      normalize: uint8 images to the model's input.
      batches: iterates over the split once, as batches on the device; padding is masked.
    """

    def __init__(
        self,
        *,
        apply: Callable[..., Any],
        normalize: Callable[[Array], Array],
        batches: Callable[[], Iterable[dict[str, Array]]],
    ):
        self._batches = batches

        @jax.jit
        def sums(params: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
            logits, _ = apply({"params": params}, normalize(batch["image"]), train=False)
            return metrics.batch_sums(logits, batch["label"], batch["mask"])

        self._sums = sums

    def run(self, state: TrainState) -> dict[str, float]:
        """The metrics of the state; those of the moving average start with "ema_"."""
        results = self._evaluate(state.params)
        if state.ema is not None:
            results |= {f"ema_{name}": value for name, value in self._evaluate(state.ema).items()}
        return results

    def _evaluate(self, params: PyTree) -> dict[str, float]:
        # All batches are dispatched before the first result is fetched.
        first, *rest = [self._sums(params, batch) for batch in self._batches()]
        return metrics.summarise(functools.reduce(metrics.add_sums, rest, metrics.add_sums(None, first)))
