"""The optimiser: one optax chain, read from top to bottom.

Every number may be a Python float or a traced scalar, and the structure of the state depends on none of them: the train
step rebuilds the transformation from the numbers of a sweep and may be vmapped over its members.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_flax.param_groups import KERNELS, make_groups
from vit_flax.schedules import is_off, make_schedule
from vit_flax.typing import ArrayLike, PyTree


def make_optimizer(
    *,
    name: str,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike,
    total_steps: int,
    schedule: str = "cosine",
    warmup_steps: ArrayLike = 0,
    warmup_learning_rate: ArrayLike = 0.0,
    end_learning_rate: ArrayLike = 0.0,
    end_steps: ArrayLike = 0,
    cooldown_steps: ArrayLike = 0,
    cooldown_shape: str = "linear",
    timescale_steps: ArrayLike | None = None,
    clip_norm: ArrayLike | None = None,
    decay_mask: Sequence[str] = KERNELS,
    lr_multipliers: Sequence[Sequence[Any]] = (),
    layer_decay: ArrayLike | None = None,
    freeze: Sequence[str] = (),
    train_last_blocks: int | None = None,
    **rule: Any,
) -> optax.GradientTransformation:
    """Builds the optimiser of a run from the `optim` section of a config.

    A frozen parameter is left bit for bit as it is, and takes no part in the clipping norm.

    Args:
        name: the update rule, a key of `RULES`.
        learning_rate: the peak.
        weight_decay: decoupled, in AdamW units: each update subtracts learning_rate * weight_decay * parameter.
        total_steps: number of updates of the run.
        schedule: shape of the learning rate over the run; this and the next seven as in `schedules.make_schedule`.
        warmup_steps: updates of the linear warm-up.
        warmup_learning_rate: where the warm-up starts.
        end_learning_rate: where the schedule ends.
        end_steps: updates at `end_learning_rate`, at the end.
        cooldown_steps: updates of the cool-down.
        cooldown_shape: "linear" or "sqrt".
        timescale_steps: of the rsqrt schedule.
        clip_norm: largest global norm of the gradient; 0 is off, None is the rule's default (`CLIP_NORMS`, else off).
        decay_mask: patterns of the parameters that decay; this and the next four as in `param_groups.make_groups`.
        lr_multipliers: pairs (pattern, factor).
        layer_decay: factor of layer-wise learning-rate decay.
        freeze: patterns of the parameters that stay as they are.
        train_last_blocks: freezes the embeddings and all but so many blocks.
        **rule: arguments of the update rule, for example b1 and b2 of `adamw`.

    Raises:
        ValueError: an unknown name or argument, or a pattern that matches no parameter (by `init`).

    Source: the order is that of big_vision/optax.py:make, except that the decay comes before the learning rate.
    """
    learning_rate_at = make_schedule(
        learning_rate=learning_rate,
        total_steps=total_steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        warmup_learning_rate=warmup_learning_rate,
        end_learning_rate=end_learning_rate,
        end_steps=end_steps,
        cooldown_steps=cooldown_steps,
        cooldown_shape=cooldown_shape,
        timescale_steps=timescale_steps,
    )
    make_rule = _find_rule(name, rule)
    clip_norm = CLIP_NORMS.get(name) if clip_norm is None else clip_norm

    def chain(params: PyTree) -> optax.GradientTransformation:
        groups = make_groups(
            params,
            decay_mask=() if is_off(weight_decay) else decay_mask,
            lr_multipliers=lr_multipliers,
            layer_decay=layer_decay,
            freeze=freeze,
            train_last_blocks=train_last_blocks,
        )
        update = make_rule(**rule)
        return optax.chain(
            clip(clip_norm),
            update.direction,
            add_decay(weight_decay, groups.decay),
            update.after_decay,
            scale_by_tree(groups.factor),
            optax.scale_by_schedule(learning_rate_at),
            optax.scale(-1.0),
        )

    return _built_for_params(chain)


class Rule(NamedTuple):
    """The part of the chain that an optimiser's name stands for."""

    direction: optax.GradientTransformation
    after_decay: optax.GradientTransformation = optax.identity()


def adamw(*, b1: ArrayLike = 0.9, b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8, mu_dtype: str | None = None) -> Rule:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return Rule(optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype))


def sgd(*, momentum: ArrayLike | None = 0.9, nesterov: bool = False, mu_dtype: str | None = None) -> Rule:
    """Stochastic gradient descent; momentum None keeps no buffer. The decay is decoupled, not added to the gradient."""
    return Rule(optax.identity() if momentum is None else optax.trace(momentum, nesterov, mu_dtype))


RULES: dict[str, Callable[..., Rule]] = {
    "adamw": adamw,
    "sgd": sgd,
}
CLIP_NORMS: dict[str, float] = {}


def clip(clip_norm: ArrayLike | None) -> optax.GradientTransformation:
    """Scales the gradient down to the given global norm; not at all for None or 0."""
    if clip_norm is None or is_off(clip_norm):
        return optax.identity()
    return optax.clip_by_global_norm(clip_norm)


def add_decay(weight_decay: ArrayLike, mask: PyTree) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the update, where the mask (broadcast against the parameter) is true."""
    if is_off(weight_decay):
        return optax.identity()
    return optax.stateless(lambda u, p: jax.tree.map(lambda u, p, m: u + weight_decay * m * p, u, p, mask))


def scale_by_tree(factors: PyTree) -> optax.GradientTransformation:
    """Multiplies each update by its own factor, a scalar or one number per layer."""
    if all(isinstance(f, np.ndarray) and (f == 1).all() for f in jax.tree.leaves(factors)):
        return optax.identity()
    return optax.stateless(lambda u, _: jax.tree.map(lambda u, f: u * f, u, factors))


def _built_for_params(chain: Callable[[PyTree], optax.GradientTransformation]) -> optax.GradientTransformation:
    """A transformation whose parts are made for the tree it is given.

    optax multiplies int32 counts and float32 numbers, and moments of two precisions: it needs the standard promotion
    rules, whatever the caller has set, and the update goes back to the gradient's dtype.
    """

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return chain(params).init(params)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("This optimiser reads the parameters: call update(gradients, state, params).")
        with jax.numpy_dtype_promotion("standard"):
            new, state = chain(params).update(updates, state, params)
            return jax.tree.map(lambda n, u: jnp.asarray(n, u.dtype), new, updates), state

    return optax.GradientTransformation(init, update)


def _find_rule(name: str, arguments: dict[str, Any]) -> Callable[..., Rule]:
    if name not in RULES:
        raise ValueError(f"Unknown optimiser {name=}; expected one of {', '.join(RULES)}.")
    known = inspect.signature(RULES[name]).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(
            f"The optimiser {name!r} takes no {', '.join(unknown)}; its own arguments are {', '.join(known)}."
        )
    return RULES[name]
