"""Where files are kept between runs, and that compiled programs are."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vit_flax.cache import cache_dir, enable_compilation_cache

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "/home/me/.cache/vit_flax"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/vit_flax"),
        ({"XDG_CACHE_HOME": "/xdg", "VIT_FLAX_CACHE_DIR": "/own"}, "/own"),
        ({"VIT_FLAX_CACHE_DIR": "~/own"}, "/home/me/own"),
        ({"XDG_CACHE_HOME": "", "VIT_FLAX_CACHE_DIR": ""}, "/home/me/.cache/vit_flax"),
    ],
)
def test_cache_is_where_the_variables_say(variables, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("XDG_CACHE_HOME", "VIT_FLAX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.fixture
def settings():
    """Reads JAX's two settings; they are as before afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield lambda: tuple(jax.config.values[name] for name in names)
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("unset", [None, ""])
def test_compiled_programs_are_kept_in_the_cache(unset, settings, monkeypatch):
    monkeypatch.setenv("VIT_FLAX_CACHE_DIR", "/own")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", unset)
    enable_compilation_cache()
    assert settings() == ("/own/xla", 0.5)


def test_a_folder_that_jax_was_told_to_use_stays_in_charge(settings, monkeypatch):
    monkeypatch.setenv("VIT_FLAX_CACHE_DIR", "/own")
    jax.config.update("jax_compilation_cache_dir", "/theirs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    enable_compilation_cache()
    assert settings() == ("/theirs", 7.0)


def test_what_jax_was_told_of_the_shortest_compilation_stays_in_charge(settings, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    monkeypatch.setenv("VIT_FLAX_CACHE_DIR", "/own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)  # as JAX does when it starts
    enable_compilation_cache()
    assert settings() == ("/own/xla", 7.0)


def test_the_second_start_of_a_job_does_not_compile(tmp_path):
    code = """
import jax
from vit_flax.cache import enable_compilation_cache
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # for a program as small as this
jax.jit(lambda: 1 + jax.numpy.arange(3))()
print(*(events.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses")))
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "VIT_FLAX_CACHE_DIR": str(tmp_path)}
    starts = [subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT, env=env) for _ in range(2)]
    assert [start.split() for start in starts] == [["0", "1"], ["1", "0"]]
    assert any((tmp_path / "xla").iterdir())
