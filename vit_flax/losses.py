"""Objectives on logits: one number per batch, a mean over the examples that the mask keeps.

Under jit with the batch sharded over devices the sums are global, so the mean is the one a single device would compute.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vit_flax.typing import Array, ArrayLike, Bool, Float


def softmax_xent(
    logits: Float[Array, "b v"],
    targets: Float[Array, "b v"],
    mask: Bool[Array, "b"] | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """Softmax cross-entropy, -sum_v targets log softmax(logits), averaged over the batch.

    Args:
        logits: unnormalised scores; computed in float32 whatever their dtype.
        targets: a distribution over the classes per example, one-hot or mixed.
        mask: False for padding; None keeps every example.
        label_smoothing: part of the target's mass that is spread evenly over all classes; may be traced.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    logits = _without_padding(logits, targets, mask)
    smoothed = smooth(targets, label_smoothing)
    return masked_mean(-jnp.sum(smoothed * jax.nn.log_softmax(logits), axis=-1), mask)


def sigmoid_xent(
    logits: Float[Array, "b v"],
    targets: Float[Array, "b v"],
    mask: Bool[Array, "b"] | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    reduction: str,
    threshold: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy of every class on its own, averaged over the batch; for multi-label data too.

    Args:
        logits: unnormalised scores; computed in float32 whatever their dtype.
        targets: between 0 and 1 per class.
        mask: False for padding; None keeps every example.
        label_smoothing: part of the target's mass that is spread evenly over all classes; may be traced.
        reduction: over the classes: "sum" (big_vision, AugReg) or "mean" (DeiT III); they differ by a factor v.
        threshold: replaces the targets by `targets > threshold`, before the smoothing; DeiT III has 0 after mixup. None
            keeps them.

    Raises:
        ValueError: an unknown reduction, shapes that do not fit each other.

    Source: big_vision/utils.py:sigmoid_xent; DeiT III main.py (`bce_loss`) with engine.py's `targets.gt(0.0)`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"Unknown {reduction=}; expected one of {', '.join(REDUCTIONS)}.")
    logits = _without_padding(logits, targets, mask)
    if threshold is not None:
        targets = (targets > threshold).astype(jnp.float32)
    goal = smooth(targets, label_smoothing)
    # -y log sigmoid(x) - (1 - y) log sigmoid(-x)
    per_class = jax.nn.softplus(logits) - goal * logits
    return masked_mean(REDUCTIONS[reduction](per_class, axis=-1), mask)


LOSSES = {"softmax_xent": softmax_xent, "sigmoid_xent": sigmoid_xent}
# What the logits become probabilities by, as each loss has it: the classes share one picture, or each has its own.
PROBABILITIES: dict[str, Callable[[Array], Array]] = {"softmax_xent": jax.nn.softmax, "sigmoid_xent": jax.nn.sigmoid}
REDUCTIONS = {"sum": jnp.sum, "mean": jnp.mean}


def as_evaluated(name: str, **section: Any) -> Callable[..., Float[Array, ""]]:
    """The loss of a `loss` section on labels as they are, `(logits, targets, mask) -> mean loss`.

    Smoothing and threshold change the labels; everything else says what the loss is, such as the reduction, and stays.
    """
    return partial(LOSSES[name], **{k: v for k, v in section.items() if k not in ("label_smoothing", "threshold")})


def smooth(targets: Float[Array, "b v"], label_smoothing: ArrayLike) -> Float[Array, "b v"]:
    """(1 - a) targets + a / v in float32 (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""
    amount = jnp.asarray(label_smoothing, jnp.float32)
    return (1.0 - amount) * targets.astype(jnp.float32) + amount / targets.shape[-1]


def _without_padding(logits: Array, targets: Array, mask: Array | None) -> Array:
    """The logits in float32, zero where the mask is False.

    A NaN there must not reach the loss at all: its gradient would be 0 * NaN, even if the mean leaves its value out.
    """
    rows = logits.shape[:-1] if mask is None else mask.shape
    if logits.ndim != 2 or logits.shape != targets.shape or rows != logits.shape[:1]:
        found = f"{logits.shape}, {targets.shape} and {None if mask is None else mask.shape}"
        raise ValueError(f"Expected logits [b, v], targets [b, v] and a mask [b] or None, found the shapes {found}.")
    logits = logits.astype(jnp.float32)
    return logits if mask is None else jnp.where(mask[:, None], logits, 0.0)


def masked_mean(values: Float[Array, "b"], mask: Bool[Array, "b"] | None) -> Float[Array, ""]:
    """Mean over the examples that the mask keeps; 0 when it keeps none. A masked value may even be NaN."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)
