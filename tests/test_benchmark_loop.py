"""That the benchmark times what it says; no test looks at the times."""

import pytest

from tests.helpers import tiny_config
from vit_flax import benchmark_loop
from vit_flax.config import plain


@pytest.fixture
def turns(monkeypatch):
    """What the benchmark's run did, in order."""
    made = []
    real = benchmark_loop.Turns

    def keep(*arguments):
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(benchmark_loop, "Turns", keep)
    return made


def test_a_real_run_takes_turns_with_bare_steps(turns, capsys):
    config = plain(tiny_config()) | {"sinks": {}}
    result = benchmark_loop.measure(config, windows=2, steps=3, log_every_steps=3)
    (only,) = turns
    assert [len(spent) for spent in only.spent.values()] == [2, 2, 2]
    assert all(clock > 0 for spent in only.spent.values() for clock, _ in spent)
    assert int(only._state.step) == 2 * 3  # bare steps change a state of their own
    assert (result["windows"], result["batch_size"]) == (2, 64)
    said = capsys.readouterr().out
    total = benchmark_loop.WARMUP_STEPS + 2 * 2 * 3 + 1
    assert f"step {total}/{total} loss" in said  # the loop that is timed logs, and goes through to its end
    assert [line for line in said.splitlines() if "test/top1" in line and line.startswith("step")] == [
        line for line in said.splitlines() if line.startswith(f"step {total} test/")
    ]  # evaluations are due at the end only
