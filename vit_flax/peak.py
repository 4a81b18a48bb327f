"""The rate that a device could reach, for MFU (model FLOPs utilisation): known or measured, never guessed."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.chips import BFLOAT16_FLOPS_PER_SEC


def find_peak(peak_tflops: float | int | str, dtype: str) -> tuple[float, str] | None:
    """FLOP/s of one device, and a sentence that says where the number is from.

    Args:
      peak_tflops: "known": by `chips.BFLOAT16_FLOPS_PER_SEC`; "measured": the fastest of some large matrix products,
        now; or a number.
      dtype: of the products that are measured.

    Returns: None for "known" where the device is not in the table, as a CPU never is.
    """
    check(peak_tflops)
    kind = jax.local_devices()[0].device_kind
    if peak_tflops == "known":
        known = BFLOAT16_FLOPS_PER_SEC.get(kind)
        return None if known is None else (known, f"known: {kind}, dense bfloat16")
    if peak_tflops == "measured":
        peak, side = measure(dtype)
        return peak, f"measured now: {dtype} product of {side} x {side} matrices on {kind}"
    return float(peak_tflops) * 1e12, "from run.peak_tflops"


def check(peak_tflops: float | int | str) -> None:
    """Raises ValueError for a word that means nothing here, or a number that is not positive."""
    if peak_tflops not in ("known", "measured") and (isinstance(peak_tflops, str) or not peak_tflops > 0):
        raise ValueError(f"peak_tflops={peak_tflops!r}: expected 'known', 'measured' or TFLOP/s of one device.")


def measure(dtype: str, least_secs: float = 0.05) -> tuple[float, int]:
    """FLOP/s of the fastest of five products of square matrices, and their side: the first to take `least_secs`."""
    product = jax.jit(jnp.matmul)
    side = 512
    while True:
        a = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32), dtype)
        product(a, a).block_until_ready()
        secs = []
        for _ in range(5):
            since = time.perf_counter()
            product(a, a).block_until_ready()
            secs.append(time.perf_counter() - since)
        if min(secs) >= least_secs or side >= 16384:
            return 2 * side**3 / min(secs), side
        side *= 2
