"""Accuracy, loss and calibration of a classifier on a split, each example counted once."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_flax import metrics
from vit_flax.evals.samples import Samples
from vit_flax.evals.weights import Figures, one_late, raw_and_average
from vit_flax.sharding import data_shard, local_rows
from vit_flax.step import TrainState
from vit_flax.typing import Array, PyTree

MAX_CONFUSION = 100  # classes; a larger matrix is no picture


class Classification:
    """Evaluates the parameters (and their moving average, where there is one) on one split.

    Args:
      apply: `(variables, images, train=False) -> (logits, out)`.
      normalize: uint8 images to the model's input.
      batches: iterates over the split once, as batches on the host; padding is masked.
      put: a batch of the host to the devices.
      rows: sharding of an array with one row per example.
      num_classes: v.
      loss: `(logits, targets, mask) -> mean loss`.
      probabilities: of the classes, from logits.

    Attributes:
      figures: names of what `run` returns, without those of the moving average.
      several_labels: whether it is for data with several labels per example.
      details: of the last run: counts per class `class_count`, `class_predicted` and `class_top1` [v], the matrix
        `confusion` [true, predicted] up to `MAX_CONFUSION` classes, and `samples`, a list of predictions.
    """

    figures = ("loss", "count", "top1", "top5", "ece")
    several_labels = False

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
        self._batches, self._put, self._num_classes = batches, put, num_classes
        self._shard = data_shard(cast(Mesh, rows.mesh))
        self.details: dict[str, Any] = {}

        def measure(params: PyTree, batch: dict[str, Array]) -> tuple[dict[str, Array], tuple[Array, Array]]:
            logits, _ = apply({"params": params}, normalize(batch["image"]), train=False)
            small = num_classes <= MAX_CONFUSION
            scores = dict(loss=loss, probabilities=probabilities)
            sums = metrics.batch_sums(logits, batch["label"], batch["mask"], **scores, confusion=small)
            # The logits are ranked: probabilities of sure classes are all 1.
            _, classes = jax.lax.top_k(logits, min(5, num_classes))
            ranked = jnp.take_along_axis(probabilities(logits.astype(jnp.float32)), classes, axis=-1)
            return sums, (ranked, classes)

        self._measure = jax.jit(measure, out_shardings=(NamedSharding(rows.mesh, PartitionSpec()), rows))

    def run(self, state: TrainState) -> Figures:
        """The metrics of the state; those of the moving average start with "ema_"."""
        return raw_and_average(state, self._evaluate)

    def _evaluate(self, params: PyTree) -> Figures:
        total, samples = None, Samples(self._num_classes, self._shard)
        for batch, (sums, ranked) in one_late(lambda b: self._measure(params, b), self._batches(), self._put):
            total = metrics.add_sums(total, sums)
            samples.add(batch, *map(local_rows, ranked))
        if total is None:
            raise ValueError("No example was evaluated: the split is empty.")
        found = {name: total[name].tolist() for name in total if name.startswith("class_") or name == "confusion"}
        self.details = found | {"samples": samples.chosen()}
        return metrics.summarise(total)
