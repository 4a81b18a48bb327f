"""Cases that take turns, and what the machine itself can do."""

import contextlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.chips import BFLOAT16_FLOPS_PER_SEC


class LeftOut(RuntimeError):
    """A case cannot be measured here; the message says which and why."""


@runtime_checkable
class Runner(Protocol):
    """Something that can take its turn."""

    def run(self, steps: int) -> float:
        """Does a step that does not count, then so many steps; returns the seconds of these. Raises LeftOut."""
        ...


def take_turns(runners: Mapping[str, Runner], *, rounds: int, min_seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each runner, one entry per round; in a round all take one turn.

    A machine that slows down for a while hits all alike, so that ratios within a round hold where single times do not.
    One that raises LeftOut is left out, with a message.

    Args:
      runners: by name.
      rounds: number of turns of each.
      min_seconds: a turn does as many steps as take at least so long.
    """
    steps: dict[str, int] = {}
    for name, runner in runners.items():
        with left_out():
            once = min(runner.run(1), runner.run(1))
            steps[name] = max(1, round(min_seconds / once))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in list(seconds):
            before = seconds.pop(name)
            with left_out():
                seconds[name] = [*before, runners[name].run(steps[name]) / steps[name]]
    return {name: seconds[name] for name in steps if name in seconds}


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Ends at a LeftOut, and says why."""
    try:
        yield
    except LeftOut as error:
        print(f"left out: {error}", file=sys.stderr, flush=True)


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(of, to))


class Matmul:
    """One matrix product with a float32 result, in random numbers: the machine's own rate."""

    def __init__(self, m: int, k: int, n: int, dtype: str):
        rng = np.random.default_rng(0)
        a, b = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in ((m, k), (k, n)))
        self.flops = 2.0 * m * k * n
        program = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)).lower(a, b).compile()
        self._call = lambda: program(a, b)

    def run(self, steps: int) -> float:
        """See `Runner`."""
        self._call().block_until_ready()
        since = time.perf_counter()
        for _ in range(steps):
            y = self._call()
        y.block_until_ready()
        return time.perf_counter() - since


def ceilings(dtypes: set[str], tokens: int, width: int, mlp_dim: int) -> dict[str, Matmul]:
    """Matrix products to measure the machine by: a large square one, and the model's own largest shape."""
    side = 1536 if jax.default_backend() == "cpu" else 8192
    return {
        f"{dtype} matmul {m}x{k}x{n}": Matmul(m, k, n, dtype)
        for dtype in sorted(dtypes)
        for m, k, n in ((side, side, side), (tokens, width, mlp_dim))
    }


def data_sheet_gflops(dtype: str) -> float | None:
    """The maker's figure for dense products on this device; None where there is none, as for all but bfloat16."""
    known = BFLOAT16_FLOPS_PER_SEC.get(jax.devices()[0].device_kind)
    return None if known is None or dtype != "bfloat16" else known / 1e9


def peak_memory_bytes() -> int:
    """The most that the device held since the start, or this process where the device is the host."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes() -> int:
    """What a program may take: the device's limit, or nine tenths of the host's free memory."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(0.9 * int(available.split()[1]) * 1024)
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    device = jax.devices()[0]
    # On the CPU the number of usable cores is that of the process, not of the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device.device_kind if device.platform != "cpu" else model or "cpu",
        "backend": jax.default_backend(),
        "cores": cores,
        "load_average": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
    }
