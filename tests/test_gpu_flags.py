"""What XLA is told on NVIDIA GPUs, and nowhere else."""

import ast
import importlib.util
import os
from pathlib import Path

import jax
import pytest

from vit_flax.gpu_flags import FLAGS, set_gpu_flags

OURS = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("plugin", "given", "expected"),
    [
        (None, None, None),
        (None, "--xla_a=1", "--xla_a=1"),
        ("jax_cuda12_plugin", None, OURS),
        ("jax_cuda13_plugin", "--xla_a=1", f"--xla_a=1 {OURS}"),
        ("jax_cuda12_plugin", "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
    ],
)
def test_flags_are_added_where_there_is_a_plugin_and_given_ones_stay(plugin, given, expected, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == plugin else None)
    monkeypatch.setenv("XLA_FLAGS", given or "")  # put back after the test
    if given is None:
        monkeypatch.delenv("XLA_FLAGS")
    set_gpu_flags()
    assert os.environ.get("XLA_FLAGS") == expected


@pytest.mark.parametrize("name", FLAGS)
def test_xla_knows_the_flags(name):
    """One that it does not know ends a process."""
    options = {name: FLAGS[name] == "true"}
    assert jax.jit(lambda: 1, compiler_options=options)() == 1
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda: 2, compiler_options={f"{name}_not": True})()


# Those that compute with JAX; `reliability` starts the launcher.
COMMANDS = ("main", "predict", "sweep/__main__", "sweep/run", "benchmark/__main__", "benchmark_loop")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_sets_them(command):
    """By reading: what a command does to the environment of a process cannot be seen after it."""
    path = Path(__file__).parent.parent / "vit_flax" / f"{command}.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert any(isinstance(call.func, ast.Name) and call.func.id == "set_gpu_flags" for call in calls)
