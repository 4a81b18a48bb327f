"""Whether the points of a sweep can be trained, before the first one starts."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from vit_flax.config import ConfigError
from vit_flax.sweep.points import Point


def check_apart(where: Path, points: Sequence[Point], metrics: Sequence[str]) -> list[int]:
    """As `check`, in a process that ends: the accelerators that JAX takes there are free again for the points."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(check, where, points, metrics).result()


def check(where: Path, points: Sequence[Point], metrics: Sequence[str]) -> list[int]:
    """Builds every point, compiles nothing; returns their numbers of steps.

    Args:
      where: the sweep file, for messages.
      points: to build.
      metrics: of the sweep file.

    Raises: ConfigError: names the point and what is wrong with it; or a metric that no point will have.
    """
    from vit_flax.checks import figures
    from vit_flax.job import build

    lengths, known = [], dict[str, None]()
    for point in points:
        try:
            job = build(point.config)
        except ConfigError as error:
            raise ConfigError(f"{where}, point {point.index} ({point.name}): {error}") from error
        lengths.append(job.run.total_steps)
        known |= dict.fromkeys(figures(job.config["evals"], keeps_average=bool(job.run.ema_decay)))
    for name in (metric.removeprefix("-") for metric in metrics):
        if name not in known and not name.startswith("train/"):
            raise ConfigError(
                f"{where}: metrics() returns {name!r}, which no evaluation finds: expected "
                f"{', '.join(known) or 'there is none'}, or one of training, such as train/loss."
            )
    return lengths
