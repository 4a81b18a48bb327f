"""Strict numerics for every test: no silent dtype or rank promotion, shapes checked, eight virtual devices."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time of these tests, and the programs are tiny: optimise them little.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# Compiled programs are shared between the tests, the workers of pytest-xdist and the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "vit_flax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from jaxtyping import install_import_hook

install_import_hook(["vit_flax"], "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
