"""Strict numerics for every test: no silent dtype or rank promotion, shapes checked, eight virtual devices."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes much of the time of these tests, and the programs are tiny: optimise them little.
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a sixth of the time; later versions have no such choice
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
# Compiled programs are shared between the tests, the workers of pytest-xdist and the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "vit_flax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from jaxtyping import install_import_hook

from tests import typecheck

# Of every module that has array types in it; the others are for pyright alone, since checking takes as long as decoding
# a small picture.
root = Path(__file__).parent.parent
files = [file for file in root.glob("vit_flax/**/*.py") if "from vit_flax.typing import" in file.read_text("utf-8")]
shaped = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
install_import_hook(shaped, f"{typecheck.__name__}.check")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
