"""Evaluation metrics as sums: exact over any batching, padding and sharding, each example counted once.

`batch_sums` runs inside jit; its results are added over batches (`add_sums`) and turned into figures (`summarise`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.typing import Array, Bool, Float, Int

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017 (arXiv:1706.04599)


def batch_sums(
    logits: Float[Array, "b v"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"],
    *,
    confusion: bool = False,
) -> dict[str, Any]:
    """Sums over one batch of single-label classification.

    Args:
        logits: unnormalised scores.
        labels: class numbers; those under the mask may be anything.
        mask: False for padding.
        confusion: also count (label, prediction) pairs, an integer matrix [v, v].
    """
    logits = logits.astype(jnp.float32)
    num_classes = logits.shape[-1]
    labels = jnp.clip(labels, 0, num_classes - 1)
    log_p = jax.nn.log_softmax(logits)
    _, ranked = jax.lax.top_k(logits, min(5, num_classes))
    hits = ranked == labels[:, None]
    predicted, confidence = ranked[:, 0], jnp.exp(jnp.max(log_p, axis=-1))
    bins = jnp.clip(jnp.ceil(confidence * NUM_BINS).astype(jnp.int32) - 1, 0, NUM_BINS - 1)
    in_bin = jax.nn.one_hot(bins, NUM_BINS, dtype=bool) & mask[:, None]
    sums = {
        "count": jnp.sum(mask.astype(jnp.int32)),
        "loss": -jnp.sum(jnp.where(mask, jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0], 0.0)),
        "top1": jnp.sum((hits[:, 0] & mask).astype(jnp.int32)),
        "top5": jnp.sum((hits.any(axis=-1) & mask).astype(jnp.int32)),
        "bin_count": jnp.sum(in_bin.astype(jnp.int32), axis=0),
        "bin_top1": jnp.sum((in_bin & hits[:, :1]).astype(jnp.int32), axis=0),
        "bin_confidence": jnp.sum(jnp.where(in_bin, confidence[:, None], 0.0), axis=0),
    }
    if confusion:
        pairs = jnp.zeros((num_classes, num_classes), jnp.int32)
        sums["confusion"] = pairs.at[labels, predicted].add(mask.astype(jnp.int32))
    return sums


def add_sums(total: Mapping[str, Any] | None, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Adds one batch's sums to the total on the host, in float64 and int64; None starts a total."""
    wide = {k: np.asarray(v, np.int64 if np.issubdtype(v.dtype, np.integer) else np.float64) for k, v in sums.items()}
    return wide if total is None else {k: total[k] + v for k, v in wide.items()}


def summarise(sums: Mapping[str, Any]) -> dict[str, float]:
    """Turns sums into figures: loss, top1 and top5 (fractions), ece (expected calibration error), count."""
    count = int(sums["count"])
    if count == 0:
        raise ValueError("No example was evaluated: the split is empty or every example is masked.")
    gap = np.abs(np.asarray(sums["bin_top1"], np.float64) - np.asarray(sums["bin_confidence"], np.float64))
    return {
        "loss": float(sums["loss"]) / count,
        "top1": int(sums["top1"]) / count,
        "top5": int(sums["top5"]) / count,
        "ece": float(gap.sum()) / count,
        "count": float(count),
    }
