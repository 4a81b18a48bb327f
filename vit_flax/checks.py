"""What a config may get wrong between its parts, found before anything expensive starts; `job.build` calls it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from vit_flax.config import ConfigError, named
from vit_flax.data import Data
from vit_flax.evals import EVALS
from vit_flax.models.vit import ViT
from vit_flax.typing import PyTree


def check_logits(model: ViT, params: PyTree, data: Data, normalize: Callable[..., Any]) -> None:
    """Traces the model on the pictures of an evaluation: learned positions, for one, take those of one size only.

    Args:
      model: of the run.
      params: their shapes, for the pictures of training.
      data: whose first evaluation picture is read.
      normalize: uint8 images to the model's input.

    Raises: ConfigError: the model does not take the pictures, or does not give one row of logits for each.
    """
    with named("data"):
        shape, trained = data.eval_image_shape, data.image_shape
    images = jax.ShapeDtypeStruct((data.eval_batch_size, *shape), np.uint8)
    try:
        logits = jax.eval_shape(lambda p, x: model.apply({"params": p}, normalize(x), train=False)[0], params, images)
    except (FlaxError, ValueError, TypeError) as error:
        raise ConfigError(
            f"data.eval_transforms make pictures of {shape}, and the model does not take them: expected {trained}, as "
            "in training. End both lists of transforms with a resize or a crop to one size, and decode to as many "
            f"channels.\n({str(error).splitlines()[0]})"
        ) from error
    expected = (data.eval_batch_size, data.num_classes)
    if logits.shape != expected:
        raise ConfigError(
            f"model.pool={model.pool!r} gives logits {logits.shape}: expected one row per picture, {expected}. "
            "Choose a pool that makes one vector of all tokens, such as 'gap'."
        )


def check_evaluations(
    evals: Mapping[str, Mapping[str, Any]], *, several_labels: bool, keeps_average: bool, best_metric: str | None
) -> None:
    """Checks that the evaluations are for the labels of the data, and that one of them gives `best_metric`.

    Args:
      evals: the section.
      several_labels: whether an example has several.
      keeps_average: whether the moving average of the parameters is evaluated, too.
      best_metric: of the `checkpoint` section.
    """
    for name, entry in evals.items():
        evaluation = EVALS[entry["type"]]
        if evaluation.several_labels != several_labels:
            fitting = " or ".join(repr(kind) for kind, other in EVALS.items() if other.several_labels == several_labels)
            raise ConfigError(
                f"evals.{name}.type={entry['type']!r}, but the examples of this data have "
                f"{'several labels' if several_labels else 'one label'} each: use {fitting}."
            )
    known = figures(evals, keeps_average=keeps_average)
    if best_metric is not None and best_metric not in known:
        raise ConfigError(
            f"checkpoint.{best_metric=} is none of the figures of the evaluations: "
            f"{', '.join(known) or 'there are none'}. None keeps no best checkpoint."
        )


def figures(evals: Mapping[str, Mapping[str, Any]], *, keeps_average: bool) -> list[str]:
    """The names of all that the evaluations of a config will find, such as "test/top1" and "test/ema_top1"."""
    averages = ("", "ema_") if keeps_average else ("",)
    return [
        f"{name}/{average}{figure}"
        for name, entry in evals.items()
        for average in averages
        for figure in EVALS[entry["type"]].figures
    ]
