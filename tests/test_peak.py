import jax
import pytest

from vit_flax import chips, peak
from vit_flax.peak import check, find_peak, measure


class Device:
    device_kind = "NVIDIA H100 80GB HBM3"


def test_a_cpu_is_not_known():
    assert jax.local_devices()[0].device_kind not in chips.BFLOAT16_FLOPS_PER_SEC
    assert find_peak("known", "float32") is None


def test_known_device(monkeypatch):
    monkeypatch.setattr(peak.jax, "local_devices", lambda: [Device()])
    assert find_peak("known", "bfloat16") == (989e12, "known: NVIDIA H100 80GB HBM3, dense bfloat16")


def test_given_number():
    assert find_peak(312, "float32") == (312e12, "from run.peak_tflops")
    assert find_peak(0.5, "float32") == (0.5e12, "from run.peak_tflops")


def test_measured_peak_says_so(monkeypatch):
    monkeypatch.setattr(peak, "measure", lambda dtype: (2e12, 1024))
    found = find_peak("measured", "float32")
    assert found is not None
    assert found == (2e12, f"measured now: float32 product of 1024 x 1024 matrices on {jax.devices()[0].device_kind}")


def test_measure_takes_the_first_size_that_is_long_enough(monkeypatch):
    now, sides = [0.0], []

    def product(a, b):
        assert a.dtype == b.dtype == "bfloat16"
        sides.append(len(a))
        now[0] += len(a) / 1e5  # 1024 x 1024 is the first above 10 ms
        return a

    monkeypatch.setattr(peak.jax, "jit", lambda f: product)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now[0])
    rate, side = measure("bfloat16", least_secs=0.01)
    assert (side, rate) == (1024, pytest.approx(2 * 1024**3 / 0.01024))
    assert sides == [512] * 6 + [1024] * 6  # the first of each compiles


@pytest.mark.parametrize("value", ["unknown", 0, -1.0, float("nan"), ""])
def test_anything_else_is_an_error(value):
    with pytest.raises(ValueError, match="expected 'known', 'measured' or TFLOP/s"):
        check(value)
