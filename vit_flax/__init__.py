"""Vision Transformers in JAX and Flax."""
