"""The optimiser: one optax chain, read from top to bottom; and the average of the weights.

Every number may be a Python float or a traced scalar, and the structure of the state depends on none of them: the train
step rebuilds the transformation from the numbers of a sweep and may be vmapped over its members.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from vit_flax.param_groups import KERNELS, make_groups
from vit_flax.precision import wide
from vit_flax.schedules import is_off, make_schedule
from vit_flax.tree_paths import name_of
from vit_flax.typing import ArrayLike, PyTree
from vit_flax.update_rules import CLIP_NORMS, find_rule


def make_optimizer(
    *,
    name: str,
    lr: ArrayLike,
    weight_decay: ArrayLike,
    total_steps: int,
    schedule: str = "cosine",
    warmup_steps: ArrayLike = 0,
    warmup_lr: ArrayLike = 0.0,
    end_lr: ArrayLike = 0.0,
    end_steps: ArrayLike = 0,
    cooldown_steps: ArrayLike = 0,
    cooldown_shape: str = "linear",
    timescale_steps: ArrayLike | None = None,
    clip_norm: ArrayLike | None = None,
    decay_mask: Sequence[str] = KERNELS,
    decay_multipliers: Sequence[Sequence[Any]] = (),
    lr_multipliers: Sequence[Sequence[Any]] = (),
    layer_decay: ArrayLike | None = None,
    freeze: Sequence[str] = (),
    train_last_blocks: int | None = None,
    **rule: Any,
) -> optax.GradientTransformation:
    """Builds the optimiser of a run from the `optim` section of a config.

    Args:
        name: the update rule, a key of `update_rules.RULES`.
        lr: the peak.
        weight_decay: decoupled, in AdamW units: each update subtracts lr * weight_decay * parameter.
        total_steps: number of updates of the run.
        schedule: shape of the learning rate over the run; this and the next seven as in `schedules.make_schedule`.
        warmup_steps: updates of the linear warm-up.
        warmup_lr: where the warm-up starts.
        end_lr: where the schedule ends.
        end_steps: updates at `end_lr`, at the end.
        cooldown_steps: updates of the cool-down.
        cooldown_shape: "linear" or "sqrt".
        timescale_steps: of the rsqrt schedule.
        clip_norm: largest global norm of the gradient; 0 is off, None is the rule's default (`CLIP_NORMS`, else off).
        decay_mask: patterns of the parameters that decay; this and the next five as in `param_groups.make_groups`.
        decay_multipliers: pairs (pattern, factor).
        lr_multipliers: pairs (pattern, factor).
        layer_decay: factor of layer-wise learning-rate decay.
        freeze: patterns of the parameters that stay as they are, bit for bit.
        train_last_blocks: freezes the embeddings and all but so many blocks.
        **rule: arguments of the update rule, for example b1 and b2 of `adamw`.

    Raises:
        ValueError: an unknown name or argument, or a pattern that matches no parameter (by `init`).

    Source: the order is that of big_vision/optax.py:make, except that the decay comes before the learning rate.
    """
    lr_at = make_schedule(
        lr=lr,
        total_steps=total_steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        warmup_lr=warmup_lr,
        end_lr=end_lr,
        end_steps=end_steps,
        cooldown_steps=cooldown_steps,
        cooldown_shape=cooldown_shape,
        timescale_steps=timescale_steps,
    )
    make_rule = find_rule(name, rule, schedule)
    clip_norm = CLIP_NORMS.get(name) if clip_norm is None else clip_norm

    def chain(params: PyTree) -> optax.GradientTransformation:
        groups = make_groups(
            params,
            decay_mask=decay_mask,
            decay_multipliers=decay_multipliers,
            lr_multipliers=lr_multipliers,
            layer_decay=layer_decay,
            freeze=freeze,
            train_last_blocks=train_last_blocks,
        )
        trained, groups = groups.trained, groups.without_frozen()
        update = make_rule(groups, weight_decay, **rule)
        steps = optax.chain(
            clip(clip_norm),
            update.direction,
            add_decay(weight_decay, groups.decay),
            update.after_decay,
            scale_by_tree(groups.factor),
            optax.scale_by_schedule(lr_at),
            optax.scale(-1.0),
        )
        return only(trained, update.wrap(steps, lr_at))

    return _built_for_params(chain)


def clip(clip_norm: ArrayLike | None) -> optax.GradientTransformation:
    """Scales the gradient down to the given global norm; not at all for None or 0, which may be traced."""
    if clip_norm is None or is_off(clip_norm):
        return optax.identity()

    def scale_down(updates: PyTree, _: Any) -> PyTree:
        # `optax.clip_by_global_norm` divides every number: XLA's CPU backend then writes the gradient once more.
        factor = jnp.where(jnp.greater(clip_norm, 0), jnp.minimum(1.0, clip_norm / optax.tree.norm(updates)), 1.0)
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(scale_down)


def add_decay(weight_decay: ArrayLike, factors: PyTree) -> optax.GradientTransformation:
    """Adds weight_decay * factor * parameter to the update; a factor is a scalar or one number per layer."""
    if is_off(weight_decay):
        return optax.identity()
    return optax.stateless(lambda u, p: jax.tree.map(lambda u, p, f: u + weight_decay * f * p, u, p, factors))


def scale_by_tree(factors: PyTree) -> optax.GradientTransformation:
    """Multiplies each update by its own factor, a scalar or one number per layer."""
    return optax.stateless(lambda u, _: jax.tree.map(lambda u, f: u * f, u, factors))


def only(trained: PyTree, steps: optax.GradientTransformation) -> optax.GradientTransformation:
    """Restricts a transformation to the parameters, or the layers of a stacked one, where `trained` is true.

    The gradient of a frozen layer is hidden from the clipping norm; a wholly frozen parameter has no optimiser state.
    """
    if all(t.all() for t in jax.tree.leaves(trained)):
        return steps
    masked = optax.masked(steps, jax.tree.map(np.any, trained))

    def hide(updates: PyTree) -> PyTree:
        # p + (-0.0) is p for every p, while -0.0 + 0.0 is 0.0.
        return jax.tree.map(lambda u, t: jnp.where(t, u, -0.0), updates, trained)

    # No `optax.chain`: a part of a tuple cannot be read from a checkpoint without the rest (`checkpoint.load_params`).
    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        updates, state = masked.update(hide(updates), state, params)
        return hide(updates), state

    return optax.GradientTransformation(masked.init, update)


def eval_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The weights to evaluate: the average that schedule-free keeps implicitly, otherwise `params` themselves."""
    state = _schedule_free(opt_state)
    if state is None:
        return params

    def average(y, z):
        return y if isinstance(z, optax.MaskedNode) else _average(y, z, state.b1)

    return jax.tree.map(average, params, state.z)


def kept_by_schedule_free(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those leaves of a saved state, by path, that `eval_params_of` reads; none of any other optimiser."""
    return {path: leaf for path, leaf in leaves.items() if re.fullmatch(r"opt_state/(.*/)?(b1|z/.*)", path)}


def eval_params_of(leaves: Mapping[str, Any], params: PyTree) -> PyTree:
    """As `eval_params`, of a state of schedule-free that was saved: its leaves by path; a frozen parameter has no z."""
    kept = kept_by_schedule_free(leaves)
    b1 = next(leaf for path, leaf in kept.items() if path.endswith("/b1"))
    z = {path.partition("/z/")[2]: leaf for path, leaf in kept.items()}

    def average(path, y):
        # By JAX as in training, or the last bits differ.
        return np.asarray(_average(*map(jnp.asarray, (y, z[name_of(path)], b1)))) if name_of(path) in z else y

    return jax.tree_util.tree_map_with_path(average, params)


def _average(y: Any, z: Any, b1: Any) -> Any:
    """Source: Defazio et al. 2024 (arXiv:2405.15682): y = (1 - b1) z + b1 x, solved for x."""
    return ((y - (1.0 - b1) * z) / b1).astype(y.dtype)


def _schedule_free(opt_state: PyTree) -> contrib.ScheduleFreeState | None:
    states = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, contrib.ScheduleFreeState))
    return next((s for s in states if isinstance(s, contrib.ScheduleFreeState)), None)


def ema_update(ema: PyTree, params: PyTree, step: ArrayLike, decay: ArrayLike, warmup: bool = True) -> PyTree:
    """Moves the exponential moving average of the weights by one step.

    Args:
        ema: the average so far, in its own dtype (in bfloat16 it would stand still); the initial weights before the
            first update.
        params: the new weights.
        step: number of updates of the average done so far.
        decay: part of the average that is kept, near 1.
        warmup: keeps at most (1 + step) / (10 + step), so that the initial weights are soon forgotten.

    Source: the warm-up is that of tf.train.ExponentialMovingAverage(num_updates=step).
    """
    decay = jnp.asarray(decay, jnp.float32)
    if warmup:
        done = jnp.asarray(step).astype(jnp.float32)
        decay = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    # e + (1 - d) (p - e) leaves the average alone where p = e, which d e + (1 - d) p does not.
    return jax.tree.map(lambda e, p: e + (1.0 - decay).astype(e.dtype) * (p.astype(e.dtype) - e), ema, params)


def _built_for_params(chain: Callable[[PyTree], optax.GradientTransformation]) -> optax.GradientTransformation:
    """A transformation whose parts are made for the tree it is given, and that works in float32 or better.

    optax multiplies int32 counts and float32 numbers, and moments of two precisions: it needs the standard promotion
    rules, whatever the caller has set.
    """

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return chain(params).init(wide(params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("This optimiser reads the parameters: call update(gradients, state, params).")
        with jax.numpy_dtype_promotion("standard"):
            updates, state = chain(params).update(wide(updates), state, wide(params))
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optax.GradientTransformation(init, update)
