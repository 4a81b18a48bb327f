"""Google's .npz files: outputs of google-research's own code on tiny models, and timm's reader of them at full size.

timm computes GELU exactly where the JAX code takes the tanh form, so its models are made with that form here.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vit_flax.convert.parity.case import Case, Reference
from vit_flax.convert.parity.golden import golden
from vit_flax.convert.resample import Grid

_VT, _BV = ("google-research/vision_transformer", "c6de1e5"), ("google-research/big_vision", "0127fb6")


def _shapes(*, width: int, depth: int, heads: int, patch: int, grid: int, classes: int | None, kind: str):
    """Names and shapes of a file: `kind` "original" (names from before Linen) or "siglip" (a pair's image tower)."""
    old = kind == "original"
    attention, mlp, norm2 = (1, 3, 2) if old else (0, 0, 1)
    mlp_dim, head_dim = 4 * width, width // heads
    root = "" if old else "params/img/"

    def multi_head(at: str) -> dict[str, tuple[int, ...]]:
        inputs = {f"{at}/{n}/kernel": (width, heads, head_dim) for n in ("query", "key", "value")}
        biases = {f"{at}/{n}/bias": (heads, head_dim) for n in ("query", "key", "value")}
        return {**inputs, **biases, f"{at}/out/kernel": (heads, head_dim, width), f"{at}/out/bias": (width,)}

    def dense(at: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{at}/kernel": shape, f"{at}/bias": shape[-1:]}

    def norm(at: str) -> dict[str, tuple[int, ...]]:
        return {f"{at}/scale": (width,), f"{at}/bias": (width,)}

    def feed_forward(at: str) -> dict[str, tuple[int, ...]]:
        return dense(f"{at}/Dense_0", width, mlp_dim) | dense(f"{at}/Dense_1", mlp_dim, width)

    shapes = dense(f"{root}embedding", patch, patch, 3, width) | norm(f"{root}Transformer/encoder_norm")
    if old:
        shapes |= {"cls": (1, 1, width), "Transformer/posembed_input/pos_embedding": (1, grid**2 + 1, width)}
    else:
        pool = f"{root}MAPHead_0"
        shapes |= {f"{root}pos_embedding": (1, grid**2, width), f"{pool}/probe": (1, 1, width)}
        shapes |= multi_head(f"{pool}/MultiHeadDotProductAttention_0") | norm(f"{pool}/LayerNorm_0")
        shapes |= feed_forward(f"{pool}/MlpBlock_0")
    for i in range(depth):
        block = f"{root}Transformer/encoderblock_{i}"
        shapes |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_{norm2}")
        shapes |= multi_head(f"{block}/MultiHeadDotProductAttention_{attention}")
        shapes |= feed_forward(f"{block}/MlpBlock_{mlp}")
    return shapes if classes is None else shapes | dense("head", width, classes)


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """As `case.random_tensor`, for kernels whose outputs come last."""
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return 0.1 * noise
    if name.endswith("scale"):
        return 1 + 0.1 * noise
    if not name.endswith("kernel"):
        return 0.5 * noise
    outputs = shape[-2:] if len(shape) == 3 and "/out/" not in name else shape[-1:]
    return noise / np.sqrt(np.float32(np.prod(shape) / np.prod(outputs)))


def _build(architecture: str, arguments: dict[str, Any], shapes: dict[str, Any], seed: int) -> Reference:
    import tempfile

    import timm
    import torch

    rng = np.random.default_rng(seed)
    weights = {name: _random(name, shape, rng) for name, shape in _shapes(**shapes).items()}

    def write(folder: Path) -> Path:
        np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
        return folder / "weights.npz"

    model: Any = timm.create_model(  # pyright: ignore[reportAttributeAccessIssue]
        architecture, act_layer="gelu_tanh", **arguments
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.load_pretrained(str(write(Path(folder))))

    def apply(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return Reference(write, apply)


def _timm(family: str, architecture: str, size: Grid, arguments: dict[str, Any], **shapes: Any) -> Case:
    build = partial(_build, architecture, arguments, shapes)
    return Case(family, architecture, "timm", build, (size,), full_size=True)


CASES = [
    golden("google", "vit_jax_prelinen", *_VT, (32, 32)),
    golden("google", "vit_jax_linen_prelogits", *_VT, (32, 32)),
    golden("big_vision", "big_vision_tok", *_BV, (32, 32)),
    golden("big_vision", "big_vision_gap_prelogits", *_BV, (32, 32)),
    golden("big_vision", "big_vision_gap_sincos2d_rect", *_BV, (32, 64)),
    golden("big_vision", "big_vision_map_scan", *_BV, (32, 32)),
    golden("big_vision", "big_vision_map_siglip", *_BV, (32, 32)),
    _timm(
        "google", "vit_base_patch16_224", (224, 224), {"num_classes": 1000},
        width=768, depth=12, heads=12, patch=16, grid=14, classes=1000, kind="original",
    ),
    _timm(
        "google", "vit_large_patch16_384", (384, 384), {"num_classes": 1000},
        width=1024, depth=24, heads=16, patch=16, grid=24, classes=1000, kind="original",
    ),
    _timm(
        "big_vision", "vit_base_patch16_siglip_224", (224, 224), {"num_classes": 0},
        width=768, depth=12, heads=12, patch=16, grid=14, classes=None, kind="siglip",
    ),
]  # fmt: skip
