"""Whether the points of a sweep can be trained, before the first one starts."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from vit_flax.config import ConfigError
from vit_flax.sweep.points import Point


def check_apart(where: Path, points: Sequence[Point]) -> list[int]:
    """As `check`, in a process that ends: the accelerators that JAX takes there are free again for the points."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(check, where, points).result()


def check(where: Path, points: Sequence[Point]) -> list[int]:
    """Builds every point, compiles nothing; returns their numbers of steps.

    Args:
      where: the sweep file, for messages.
      points: to build.

    Raises: ConfigError: names the point and what is wrong with it.
    """
    from vit_flax.job import build

    lengths = []
    for point in points:
        try:
            lengths.append(build(point.config).run.total_steps)
        except ConfigError as error:
            raise ConfigError(f"{where}, point {point.index} ({point.name}): {error}") from error
    return lengths
