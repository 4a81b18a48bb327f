"""What the values of a config may be, by dotted key. A type alone lets a negative learning rate through.

Only what can never be meant is refused: a run that such a value starts would be wrong, or fail hours later. What fits
together (a batch and its parts, a warm-up and the run) is checked where both are known.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """What is expected, in words, and the test of it."""

    expected: str
    allows: Callable[[Any], bool]


def number(expected: str, allows: Callable[[float], bool]) -> Limit:
    """A limit of a finite number."""

    def allows_number(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and allows(value)

    return Limit(expected, allows_number)


def one_of(*choices: str) -> Limit:
    """A limit of a name."""
    return Limit("one of " + ", ".join(map(repr, choices)), lambda value: value in choices)


NOT_NEGATIVE = number("a number of 0 or more", lambda x: x >= 0)
POSITIVE = number("a number above 0", lambda x: x > 0)
COUNT = number("1 or more", lambda x: x >= 1)
BELOW_1 = number("a number from 0 to below 1", lambda x: 0 <= x < 1)
PROBABILITY = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
UP_TO_1 = number("a number above 0, up to 1", lambda x: 0 < x <= 1)
SEED = number("a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
FLOATS = one_of("float32", "bfloat16", "float16")

# None means off, or the default, wherever the type allows it.
LIMITS = {
    "run.seed": SEED,
    "run.data_seed": SEED,
    "run.total_steps": number("a whole number from 1 to 2^31 - 1", lambda x: 1 <= x < 2**31),
    "run.log_every_steps": COUNT,
    "run.accumulate_steps": COUNT,
    "run.ema_decay": BELOW_1,
    "run.max_skipped_steps": COUNT,
    "run.dump_bad_batches": NOT_NEGATIVE,
    "data.batch_size": COUNT,
    "data.eval_batch_size": COUNT,
    "data.num_threads": COUNT,
    "data.num_workers": NOT_NEGATIVE,
    "augment.affine.rotate_degrees": NOT_NEGATIVE,
    "augment.affine.scale_percent": number("a number from 0 to below 100", lambda x: 0 <= x < 100),
    "augment.affine.shear_degrees": number("a number from 0 to below 90", lambda x: 0 <= x < 90),
    "augment.affine.translate_px": NOT_NEGATIVE,
    "augment.pad_crop_px": NOT_NEGATIVE,
    "augment.mixup_alpha": NOT_NEGATIVE,
    "augment.cutmix_alpha": NOT_NEGATIVE,
    "augment.switch_prob": PROBABILITY,
    "augment.mix_prob": PROBABILITY,
    "augment.erase_prob": PROBABILITY,
    "augment.dtype": FLOATS,
    "loss.label_smoothing": BELOW_1,
    "loss.threshold": BELOW_1,
    "optim.lr": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.warmup_lr": NOT_NEGATIVE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.end_lr": NOT_NEGATIVE,
    "optim.end_steps": NOT_NEGATIVE,
    "optim.cooldown_steps": NOT_NEGATIVE,
    "optim.timescale_steps": POSITIVE,
    "optim.clip_norm": NOT_NEGATIVE,
    "optim.layer_decay": UP_TO_1,
    "optim.b1": BELOW_1,
    "optim.b2": BELOW_1,
    "optim.b2_cap": UP_TO_1,
    "optim.eps": POSITIVE,
    "optim.momentum": BELOW_1,
    "optim.mu_dtype": FLOATS,
    "optim.trust_coefficient": POSITIVE,
    "optim.decay_exponent": POSITIVE,
    "optim.clipping_threshold": POSITIVE,
    "optim.min_dim_size_to_factor": COUNT,
    "optim.ns_steps": COUNT,
    "optim.consistent_rms": POSITIVE,
    "optim.weight_lr_power": NOT_NEGATIVE,
    "checkpoint.every_steps": NOT_NEGATIVE,
    "checkpoint.every_secs": NOT_NEGATIVE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every_steps": COUNT,
    "checkpoint.best_mode": one_of("max", "min"),
    "checkpoint.on_error": one_of("stop", "continue"),
    "evals.every_steps": NOT_NEGATIVE,
    "evals.every_secs": NOT_NEGATIVE,
}


def outside(section: str, key: str, value: Any) -> str | None:
    """What is wrong with a value of a config; None if nothing is.

    Args:
      section: "optim", or "evals.<name>".
      key: in the section, dotted where it is nested.
      value: found there.
    """
    limit = LIMITS.get(f"{section.partition('.')[0]}.{key}")
    if limit is None or value is None or limit.allows(value):
        return None
    in_epochs = f" (in steps; {section}.{key.removesuffix('_steps')}_epochs counts in epochs)"
    return f"{section}.{key}={value!r}: expected {limit.expected}{in_epochs if key.endswith('total_steps') else ''}."
