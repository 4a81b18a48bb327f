"""Learning-rate schedules: warm-up -> shape -> cool-down -> hold, one function of the number of updates done so far.

Every number may be a Python number or a traced scalar, so that a sweep can vary it inside one compiled step.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from vit_flax.typing import Array, ArrayLike

Schedule = Callable[[ArrayLike], Array]


def make_schedule(
    *,
    lr: ArrayLike,
    total_steps: int,
    schedule: str = "cosine",
    warmup_steps: ArrayLike = 0,
    warmup_lr: ArrayLike = 0.0,
    end_lr: ArrayLike = 0.0,
    end_steps: ArrayLike = 0,
    cooldown_steps: ArrayLike = 0,
    cooldown_shape: str = "linear",
    timescale_steps: ArrayLike | None = None,
) -> Schedule:
    """Builds the learning rate as a function of the number of updates already done.

    The first update sees step 0, hence `warmup_lr` when there is a warm-up; the last sees `total_steps - 1`.

    Args:
        lr: the peak, reached after `warmup_steps`.
        total_steps: number of updates of the whole run, warm-up, cool-down and hold included.
        schedule: the shape after the warm-up, a key of `SHAPES`.
        warmup_steps: updates of the linear warm-up.
        warmup_lr: where the warm-up starts.
        end_lr: what the shape and the cool-down decay to.
        end_steps: updates spent at `end_lr` at the very end (timm calls them cool-down epochs).
        cooldown_steps: updates that bring the shape down to `end_lr`, ending where the hold starts.
        cooldown_shape: a key of `COOLDOWNS`.
        timescale_steps: rsqrt only: updates after the warm-up until the rate has fallen by sqrt(2); 10,000 if None.

    Raises:
        ValueError: an unknown name, durations that do not fit into `total_steps`, a number that would have no effect.

    Source: cosine, linear, rsqrt and linear cool-down as in big_vision/utils.py:create_learning_rate_schedule; the
    "sqrt" cool-down is the 1-sqrt of Hägele et al. 2024 (arXiv:2405.18392).
    """
    _check(schedule, cooldown_shape, total_steps, warmup_steps, end_steps, cooldown_steps)
    if schedule == "wsd" and is_off(cooldown_steps):
        raise ValueError(
            "schedule='wsd' is warm-up, stable, decay: give the length of the decay as cooldown_steps > 0."
        )
    if schedule == "constant" and is_off(cooldown_steps) and not (is_off(end_lr) and is_off(end_steps)):
        raise ValueError("schedule='constant' never reaches end_lr; give cooldown_steps > 0 or drop the key.")
    if schedule != "rsqrt" and timescale_steps is not None:
        raise ValueError(f"timescale_steps belongs to schedule='rsqrt', found {schedule=}; drop the key.")
    if is_off(warmup_steps) and not is_off(warmup_lr):
        raise ValueError(
            "warmup_lr is where the warm-up starts, and there is none; give warmup_steps > 0 or drop the key."
        )
    if is_off(cooldown_steps) and cooldown_shape != "linear":
        raise ValueError(f"{cooldown_shape=} without a cool-down; give cooldown_steps > 0 or drop the key.")
    peak, start, end = (jnp.asarray(x, jnp.float32) for x in (lr, warmup_lr, end_lr))
    warmup, cooldown, hold = (jnp.asarray(x, jnp.float32) for x in (warmup_steps, cooldown_steps, end_steps))
    timescale = jnp.asarray(10_000 if timescale_steps is None else timescale_steps, jnp.float32)
    decay_end = total_steps - hold

    def lr_at(step: ArrayLike) -> Array:
        t = jnp.asarray(step).astype(jnp.float32)
        done = jnp.maximum(t - warmup, 0.0)
        progress = jnp.minimum(done / jnp.maximum(decay_end - warmup, 1.0), 1.0)
        fraction = SHAPES[schedule](progress, done / timescale)
        if not is_off(cooldown_steps):
            left = jnp.clip((decay_end - t) / jnp.maximum(cooldown, 1.0), 0.0, 1.0)
            fraction = fraction * COOLDOWNS[cooldown_shape](left)
        rate = end + (peak - end) * fraction
        if not is_off(end_steps):
            rate = jnp.where(t >= decay_end, end, rate)
        if not is_off(warmup_steps):
            warm = start + (peak - start) * t / jnp.maximum(warmup, 1.0)
            rate = jnp.where(t < warmup, warm, rate)
        return rate

    return lr_at


# Each maps (progress from 0 to 1, time in units of the time scale) to the fraction of the peak.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "cosine": lambda progress, _: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    "linear": lambda progress, _: 1.0 - progress,
    "constant": lambda progress, _: jnp.ones_like(progress),
    "rsqrt": lambda _, scaled: 1.0 / jnp.sqrt(1.0 + scaled),
    "wsd": lambda progress, _: jnp.ones_like(progress),
}

# Each maps the remaining part of the cool-down, 1 to 0, to the fraction kept.
COOLDOWNS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda left: left,
    "sqrt": lambda left: 1.0 - jnp.sqrt(1.0 - left),
}


def _check(schedule, cooldown_shape, total_steps, *durations) -> None:
    if schedule not in SHAPES:
        raise ValueError(f"Unknown {schedule=}; expected one of {', '.join(SHAPES)}.")
    if cooldown_shape not in COOLDOWNS:
        raise ValueError(f"Unknown {cooldown_shape=}; expected one of {', '.join(COOLDOWNS)}.")
    if total_steps < 1:
        raise ValueError(f"{total_steps=} must be at least 1.")
    known = [d for d in durations if isinstance(d, int | float | np.number)]
    if min(known, default=0) < 0 or sum(known) > total_steps:
        raise ValueError(
            f"warmup_steps, end_steps and cooldown_steps, found {known}, must not be negative and must fit into "
            f"{total_steps=}; shorten them (a config may give them in epochs, warmup_epochs) or train longer."
        )


def is_off(value: object) -> bool:
    """True for None or a 0 of Python or NumPy; a JAX array is always on, as a traced one has no value yet."""
    return value is None or (isinstance(value, int | float | np.number) and bool(value == 0))
