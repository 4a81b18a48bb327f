"""The training step: pure functions of a state and a batch, without configs, files or devices.

`train_step` is jitted once and bound to its parts with `functools.partial`. What it optimises is one function,
`objective(params, batch, key, hparams) -> (loss, metrics)`, one of `OBJECTIVES`; `classification` is the usual one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from vit_flax.precision import norm, wide
from vit_flax.typing import Array, PyTree

Metrics = dict[str, Array]
Objective = Callable[[PyTree, dict[str, Array], Array, dict[str, Array]], tuple[Array, Metrics]]


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes; a checkpoint is this and nothing else.

    Attributes:
      step: number of steps taken, int32; the position in the data follows from it.
      params: of the model.
      opt_state: of the optimiser.
      ema: moving average of `params`, in float32 or better, or None.
      key: the run's random key; never changes, a step folds its number in.
      hparams: the numbers that a sweep may vary, by their dotted config key (see docs/architecture.md).
      skipped_steps: steps that were skipped because something was not finite, since the start, int32.
      skipped_in_a_row: the same, since the last good step, int32.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any
    hparams: Any
    skipped_steps: Any
    skipped_in_a_row: Any


def init_state(
    key: Array,
    *,
    init: Callable[[Array], PyTree],
    optimizer: Callable[[dict[str, Array]], optax.GradientTransformation],
    hparams: dict[str, Array],
) -> TrainState:
    """The state before the first step.

    Args:
      key: of the run; parameters and training draw from different streams of it.
      init: makes parameters from a key.
      optimizer: makes the optimiser from `hparams`.
      hparams: see `TrainState`.
    """
    init_key, train_key = jax.random.split(key)
    params = init(init_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer(hparams).init(params),
        ema=jax.tree.map(jnp.copy, wide(params)) if "run.ema_decay" in hparams else None,
        key=train_key,
        hparams=hparams,
        skipped_steps=zero,
        skipped_in_a_row=zero,
    )


def augment_key(key: Array, step: Any, accumulate_steps: int = 1) -> Array:
    """The key that `train_step` with `classification` augments a batch by; of its first part, if it is cut into parts.

    Args:
      key: of the state.
      step: number of steps taken before.
      accumulate_steps: as of `train_step`.
    """
    key = jax.random.fold_in(key, step)
    return jax.random.split(key if accumulate_steps == 1 else jax.random.fold_in(key, 0))[0]


def _no_average(*_: Any) -> PyTree:
    raise TypeError("This state has a moving average: give train_step an ema_update, such as optim.ema_update.")


def _no_layers(_: PyTree) -> Metrics:
    return {}


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    objective: Objective,
    optimizer: Callable[[dict[str, Array]], optax.GradientTransformation],
    accumulate_steps: int = 1,
    ema_update: Callable[..., PyTree] = _no_average,
    layer_norms: Callable[[PyTree], Metrics] = _no_layers,
) -> tuple[TrainState, Metrics]:
    """Takes one optimiser step.

    Where the loss, the gradient, the update or the new parameters are not finite, parameters, optimiser and average
    stay as they are, bit for bit, and the step is counted.

    Args:
      state: is consumed (its buffers are donated).
      batch: arrays whose first axis is the global batch; `mask` bool [b] among them, if it is cut into parts.
      objective: `(params, batch, key, hparams) -> (mean loss, metrics)`.
      optimizer: makes the optimiser from `state.hparams`; its update already holds the learning rate.
      accumulate_steps: the batch is cut into that many parts, one after the other, to save memory; each counts by the
        examples that its mask keeps.
      ema_update: `(ema, params, step, decay) -> ema`, for a state that has one.
      layer_norms: norms of the parts of a gradient or update, by name; the default has none.

    Raises: ValueError: the parts would not be equal.

    Returns: the new state, and scalars: those of the objective, `loss`, `grad_norm`, `update_norm`, `param_norm` (of
      the new parameters), `grad_norm/<part>` and `update_norm/<part>` of `layer_norms`, `skipped` (0 or 1) and
      `skipped_in_a_row`.
    """
    key = jax.random.fold_in(state.key, state.step)
    loss, metrics, grads = _gradients(objective, state, batch, key, accumulate_steps)
    updates, opt_state = optimizer(state.hparams).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    trees = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
    numbers = {"loss": loss, **{name: norm(tree) for name, tree in trees.items()}}
    ok = jnp.all(jnp.isfinite(jnp.stack([x.astype(jnp.float32) for x in numbers.values()])))

    def keep_if_bad(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

    ema = state.ema
    if ema is not None:
        ema = keep_if_bad(ema_update(ema, params, state.step, state.hparams["run.ema_decay"]), ema)
    bad = 1 - ok.astype(jnp.int32)
    new_state = state.replace(
        step=state.step + 1,
        params=keep_if_bad(params, state.params),
        opt_state=keep_if_bad(opt_state, state.opt_state),
        ema=ema,
        skipped_steps=state.skipped_steps + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )
    for name in ("grad_norm", "update_norm"):
        numbers |= {f"{name}/{part}": norm for part, norm in layer_norms(trees[name]).items()}
    return new_state, {**metrics, **numbers, "skipped": bad, "skipped_in_a_row": new_state.skipped_in_a_row}


def _gradients(
    objective: Objective, state: TrainState, batch: dict[str, Array], key: Array, parts: int
) -> tuple[Array, Metrics, PyTree]:
    """Loss, metrics and gradients: means over the examples that the mask keeps, part by part in float32 or better."""
    grad = jax.value_and_grad(objective, has_aux=True)
    if parts == 1:
        (loss, metrics), grads = grad(state.params, batch, key, state.hparams)
        return loss, metrics, grads

    for x in jax.tree.leaves(batch):
        if x.shape[0] % parts:
            raise ValueError(f"accumulate_steps={parts} must divide the batch size {x.shape[0]}.")

    def one(total: PyTree, turn: tuple[dict[str, Array], Array, Array]) -> tuple[PyTree, None]:
        part, weight, index = turn
        means = grad(state.params, part, jax.random.fold_in(key, index), state.hparams)
        return jax.tree.map(lambda t, x: t + weight.astype(t.dtype) * x, total, wide(means)), None

    # Part i takes every `parts`-th example, so that each part stays spread over all devices.
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch)
    first = jax.tree.map(lambda x: x[0], cut)
    kept = jnp.sum(cut["mask"], axis=1).astype(jnp.float32)
    weights = kept * parts / jnp.maximum(jnp.sum(kept), 1.0)  # exactly 1 for parts without padding
    shapes = jax.eval_shape(lambda *x: wide(grad(*x)), state.params, first, key, state.hparams)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(one, zeros, (cut, weights, jnp.arange(parts)))
    (loss, metrics), grads = jax.tree.map(lambda x: x / parts, total)
    return loss, metrics, grads


def classification(
    params: PyTree,
    batch: dict[str, Array],
    key: Array,
    hparams: dict[str, Array],
    *,
    apply: Callable[..., tuple[Array, dict]],
    augment: Callable[..., tuple[Array, Array]],
    loss: Callable[..., Array],
    num_classes: int,
) -> tuple[Array, Metrics]:
    """The objective of image classification.

    Args:
      params: of the model.
      batch: `image` uint8 [b, h, w, c], `label` int32 [b] or uint8 [b, v], `mask` bool [b].
      key: of this step.
      hparams: see `TrainState`.
      apply: `(variables, images, train=, rngs=, hparams=) -> (logits, out)`.
      augment: `(key, images, targets, hparams=) -> (images, targets)`.
      loss: `(logits, targets, mask, hparams=) -> mean loss`.
      num_classes: v.

    Returns: the loss, and the top-1 accuracy on the (augmented) batch: over what the mask keeps, 0 where that is none;
      logits that are not finite are no hit. Where several classes have the largest target, as with several labels per
      example, each of them is one.
    """
    augment_key, dropout_key = jax.random.split(key)
    labels = batch["label"]
    targets = labels.astype(jnp.float32) if labels.ndim == 2 else jax.nn.one_hot(labels, num_classes)
    images, targets = augment(augment_key, batch["image"], targets, hparams=hparams)
    logits, _ = apply({"params": params}, images, train=True, rngs={"dropout": dropout_key}, hparams=hparams)
    usable = jnp.isfinite(jnp.max(logits, -1))  # `argmax` takes the first NaN
    largest = jnp.max(targets, -1)
    of_guess = jnp.take_along_axis(targets, jnp.argmax(logits, -1)[:, None], axis=-1)[:, 0]
    hits = (of_guess == largest) & (largest > 0) & usable & batch["mask"]
    top1 = jnp.sum(hits).astype(jnp.float32) / jnp.maximum(jnp.sum(batch["mask"]), 1).astype(jnp.float32)
    return loss(logits, targets, batch["mask"], hparams=hparams), {"top1": top1}


# Each takes the arguments of `classification`; its other keyword arguments are keys of the section `objective`.
OBJECTIVES: dict[str, Callable[..., tuple[Array, Metrics]]] = {"classification": classification}
