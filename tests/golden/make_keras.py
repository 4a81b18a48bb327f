"""Makes vit_from_scratch.npz: `KERAS_BACKEND=jax python tests/golden/make_keras.py` where Keras 3 is installed.

A small Keras build of the design of configs/vit_from_scratch_512.py: exact GELU, LayerNorm with Keras' epsilon of 1e-3,
heads as wide as the model, positions added before the class token joins. Random weights everywhere, so each counts.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

PATCHES, FEATURES, WIDTH, DEPTH, HEADS, MLP, CLASSES = 16, 192, 24, 3, 3, 48, 10


class Positions(layers.Layer):
    """Adds a learned embedding of the positions 0..n-1."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embed = layers.Embedding(PATCHES, WIDTH)

    def call(self, x):
        return x + self.embed(ops.arange(PATCHES))


class ClassToken(layers.Layer):
    """Puts one learned token in front."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, WIDTH), name="token")

    def call(self, x):
        return ops.concatenate([ops.broadcast_to(self.token, (ops.shape(x)[0], 1, WIDTH)), x], axis=1)


def build() -> keras.Model:
    inputs = keras.Input((PATCHES, FEATURES))
    x = layers.Dense(WIDTH, name="patch_embed")(inputs)
    x = Positions(name="posemb")(x)
    x = ClassToken(name="cls_token")(x)
    for i in range(DEPTH):
        y = layers.LayerNormalization(name=f"norm1_{i}")(x)
        x = x + layers.MultiHeadAttention(HEADS, key_dim=WIDTH, name=f"attention_{i}")(y, y)
        y = layers.LayerNormalization(name=f"norm2_{i}")(x)
        y = layers.Dense(MLP, activation="gelu", name=f"fc1_{i}")(y)
        y = layers.Dropout(0.1)(y)
        y = layers.Dense(WIDTH, name=f"fc2_{i}")(y)
        x = x + layers.Dropout(0.1)(y)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dropout(0.1)(x[:, 0])
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


model = build()
rng = np.random.default_rng(0)
out = {}
for weight in model.weights:
    if "seed_generator" in weight.path:
        continue
    scale = 1 / np.sqrt(weight.shape[0]) if "kernel" in weight.path else 0.3
    value = rng.normal(1.0 if "gamma" in weight.path else 0.0, scale, weight.shape).astype(np.float32)
    weight.assign(value)
    out[weight.path.replace("/embedding/embeddings", "/embeddings")] = value
out["patches"] = rng.uniform(-1, 1, (2, PATCHES, FEATURES)).astype(np.float32)
out["logits"] = np.asarray(model(out["patches"], training=False))
np.savez_compressed(Path(__file__).parent / "vit_from_scratch.npz", **out)
