"""Evaluation metrics as sums: exact over any batching, padding and sharding, each example counted once.

`batch_sums` runs inside jit; its results are added over batches (`add_sums`) and turned into figures (`summarise`);
`multilabel_batch_sums` and `summarise_multilabel` are the same for several labels per example.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.typing import Array, Bool, Float, Int, Shaped

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017 (arXiv:1706.04599)


def batch_sums(
    logits: Float[Array, "b v"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"],
    *,
    loss: Callable[..., Array],
    probabilities: Callable[[Array], Array],
    confusion: bool = False,
) -> dict[str, Any]:
    """Sums over one batch of single-label classification, over all of it and per class.

    Args:
        logits: unnormalised scores; where they are not finite there is no hit and no prediction, and the loss is NaN.
        labels: class numbers; outside the mask anything, inside it a number that is no class makes the loss NaN.
        mask: False for padding.
        loss: `(logits, targets, mask) -> mean loss`, as of `losses.as_evaluated`.
        probabilities: of the classes, from logits; the largest is the confidence of the calibration error.
        confusion: also count (label, prediction) pairs, an integer matrix [v, v].
    """
    logits = logits.astype(jnp.float32)
    num_classes = logits.shape[-1]
    labels = jnp.where(labels < 0, num_classes, labels)  # out of range rather than counted from the end
    _, ranked = jax.lax.top_k(logits, min(5, num_classes))
    confidence = jnp.max(probabilities(logits), axis=-1)
    # `top_k` ranks NaNs first: without this a dead model would score as one that always says class 0.
    usable = jnp.isfinite(jnp.max(logits, axis=-1))
    hits = (ranked == labels[:, None]) & usable[:, None]
    predicted = jnp.where(usable, ranked[:, 0], num_classes)  # out of range: counted nowhere
    bins = jnp.clip(jnp.ceil(confidence * NUM_BINS).astype(jnp.int32) - 1, 0, NUM_BINS - 1)
    per_class = jnp.zeros((num_classes,), jnp.int32)
    in_bin = jax.nn.one_hot(bins, NUM_BINS, dtype=bool) & mask[:, None]
    judged = jnp.where((labels < num_classes)[:, None], logits, jnp.nan)
    count = jnp.sum(mask.astype(jnp.int32))
    sums = {
        "count": count,
        "loss": loss(judged, jax.nn.one_hot(labels, num_classes), mask) * count.astype(jnp.float32),
        "top1": jnp.sum((hits[:, 0] & mask).astype(jnp.int32)),
        "top5": jnp.sum((hits.any(axis=-1) & mask).astype(jnp.int32)),
        "bin_count": jnp.sum(in_bin.astype(jnp.int32), axis=0),
        "bin_top1": jnp.sum((in_bin & hits[:, :1]).astype(jnp.int32), axis=0),
        "bin_confidence": jnp.sum(jnp.where(in_bin, confidence[:, None], 0.0), axis=0),
        "class_count": per_class.at[labels].add(mask.astype(jnp.int32)),
        "class_predicted": per_class.at[predicted].add(mask.astype(jnp.int32)),
        "class_top1": per_class.at[labels].add((hits[:, 0] & mask).astype(jnp.int32)),
    }
    if confusion:
        pairs = jnp.zeros((num_classes, num_classes), jnp.int32)
        sums["confusion"] = pairs.at[labels, predicted].add(mask.astype(jnp.int32))
    return sums


def multilabel_batch_sums(
    logits: Float[Array, "b v"],
    labels: Shaped[Array, "b v"],
    mask: Bool[Array, "b"],
    *,
    loss: Callable[..., Array],
) -> dict[str, Any]:
    """Sums over one batch of multi-label classification, and the scores themselves: average precision ranks them all.

    Args:
        logits: unnormalised scores, a binary decision per class.
        labels: 1 where the class is present, 0 elsewhere.
        mask: False for padding.
        loss: `(logits, targets, mask) -> mean loss`, as of `losses.as_evaluated`.
    """
    logits, count = logits.astype(jnp.float32), jnp.sum(mask.astype(jnp.int32))
    return {
        "count": count,
        "loss": loss(logits, labels.astype(jnp.float32), mask) * count.astype(jnp.float32),
        "rows_scores": logits,
        "rows_labels": labels.astype(bool),
        "rows_mask": mask,
    }


def add_sums(total: Mapping[str, Any] | None, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Adds one batch's sums to the total on the host, in float64 and int64; None starts a total.

    What starts with `rows_` is collected instead, as a list of arrays without the padding.
    """
    wide = {}
    for name, value in sums.items():
        value = np.asarray(value)
        if name.startswith("rows_"):
            wide[name] = [value[np.asarray(sums["rows_mask"])]]
        else:
            wide[name] = value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64)
    return wide if total is None else {name: total[name] + value for name, value in wide.items()}


def summarise(total: Mapping[str, Any]) -> dict[str, float]:
    """Turns the total of several `batch_sums` into figures.

    Returns: loss and count; top1 and top5 (fractions; fewer than five classes: all of them); ece, the expected
        calibration error.

    Raises:
        ValueError: not one example was counted.
    """
    figures = _loss_and_count(total)
    gap = np.abs(np.asarray(total["bin_top1"]) - np.asarray(total["bin_confidence"]))
    return figures | {
        "top1": float(total["top1"]) / figures["count"],
        "top5": float(total["top5"]) / figures["count"],
        "ece": float(gap.sum()) / figures["count"],
    }


def summarise_multilabel(total: Mapping[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """Turns the total of several `multilabel_batch_sums` into figures, and the average precision of each class.

    Returns: loss, count and mean_average_precision (over the classes that occur); and what that is the mean of, see
        `average_precision`.

    Raises:
        ValueError: not one example was counted.
    """
    figures = _loss_and_count(total)
    precision = average_precision(np.concatenate(total["rows_scores"]), np.concatenate(total["rows_labels"]))
    mean = float(np.nanmean(precision)) if (precision >= 0).any() else np.nan
    return figures | {"mean_average_precision": mean}, precision


def _loss_and_count(total: Mapping[str, Any]) -> dict[str, float]:
    count = int(total["count"])
    if count == 0:
        raise ValueError("No example was evaluated: the split is empty or all of it is masked.")
    return {"loss": float(total["loss"]) / count, "count": float(count)}


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum of (R_i - R_i-1) P_i over the distinct scores, per class; NaN for a class without positives.

    Args:
        scores: [n, v]; only their order within a class counts. One that is not finite finds nothing.
        labels: [n, v], true where the class is present.
    """
    labels, usable = labels.astype(bool), np.isfinite(scores)
    positives = labels.sum(axis=0)
    scores, labels = np.where(usable, scores, -np.inf), labels & usable
    order = np.argsort(-scores, axis=0, kind="stable")
    scores, labels = np.take_along_axis(scores, order, 0), np.take_along_axis(labels, order, 0)
    hits = np.cumsum(labels, axis=0)
    precision = hits / np.arange(1, len(scores) + 1)[:, None]
    # A score shared by several examples is one threshold: its precision is the one at the last of them.
    last = np.concatenate([scores[1:] != scores[:-1], np.ones_like(labels[:1])])
    previous = np.maximum.accumulate(np.where(last, hits, 0), axis=0)
    gained = hits - np.concatenate([np.zeros_like(hits[:1]), previous[:-1]])
    area = np.sum(np.where(last, gained * precision, 0.0), axis=0)
    return np.where(positives > 0, area / np.maximum(positives, 1), np.nan)
