"""XLA's flags for NVIDIA GPUs."""

import importlib.util
import os

# Without its own programs for matrix products (in Triton), XLA hands them to cuBLAS before it decides what is computed
# together: biases and the residual stream are then added while a product is written (docs/performance.md).
FLAGS = {"xla_gpu_enable_triton_gemm": "false"}


def set_gpu_flags() -> None:
    """Puts `FLAGS` into `XLA_FLAGS` where JAX's plugin for NVIDIA GPUs is installed; a flag that is given stays.

    To be called before JAX starts a backend, which reads the variable.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
