"""Where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax


def cache_dir() -> Path:
    """`$VIT_FLAX_CACHE_DIR`, or `vit_flax` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("VIT_FLAX_CACHE_DIR") or Path(base) / "vit_flax").expanduser()


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the second start of a job does not compile.

    What JAX was told (`JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`) stays in charge.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
