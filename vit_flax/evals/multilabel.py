"""Mean average precision of a classifier with several labels per example, on a split."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_flax import metrics
from vit_flax.evals.weights import Figures, one_late, raw_and_average
from vit_flax.step import TrainState
from vit_flax.typing import Array, PyTree


class Multilabel:
    """Evaluates the parameters (and their moving average, where there is one) on one split.

    The scores of the whole split are kept on every host, as average precision ranks them all.

    Args:
      apply: `(variables, images, train=False) -> (logits, out)`.
      normalize: uint8 images to the model's input.
      batches: iterates over the split once, as batches on the host; padding is masked.
      put: a batch of the host to the devices.
      rows: sharding of an array with one row per example.
      num_classes: v.
      loss: `(logits, targets, mask) -> mean loss`.
      probabilities: of the classes, from logits; average precision ranks the logits themselves.

    Attributes:
      figures: names of what `run` returns, without those of the moving average.
      several_labels: whether it is for data with several labels per example.
      details: of the last run: `class_count` and `class_average_precision` [v].
    """

    figures = ("loss", "count", "mean_average_precision")
    several_labels = True

    def __init__(
        self,
        *,
        apply: Callable[..., Any],
        normalize: Callable[[Array], Array],
        batches: Callable[[], Iterable[dict[str, np.ndarray]]],
        put: Callable[[dict[str, np.ndarray]], dict[str, Array]],
        rows: NamedSharding,
        num_classes: int,
        loss: Callable[..., Array],
        probabilities: Callable[[Array], Array],
    ):
        self._batches, self._put = batches, put
        self.details: dict[str, Any] = {}

        def measure(params: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
            logits, _ = apply({"params": params}, normalize(batch["image"]), train=False)
            return metrics.multilabel_batch_sums(logits, batch["label"], batch["mask"], loss=loss)

        self._measure = jax.jit(measure, out_shardings=NamedSharding(rows.mesh, PartitionSpec()))

    def run(self, state: TrainState) -> Figures:
        """The metrics of the state; those of the moving average start with "ema_"."""
        return raw_and_average(state, self._evaluate)

    def _evaluate(self, params: PyTree) -> Figures:
        total = None
        for _, sums in one_late(lambda b: self._measure(params, b), self._batches(), self._put):
            total = metrics.add_sums(total, sums)
        if total is None:
            raise ValueError("No example was evaluated: the split is empty.")
        figures, precision = metrics.summarise_multilabel(total)  # sorts the split once per class
        self.details = {
            "class_count": np.concatenate(total["rows_labels"]).sum(axis=0).tolist(),
            "class_average_precision": [None if np.isnan(p) else float(p) for p in precision],
        }
        return figures
