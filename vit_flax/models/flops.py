"""Arithmetic of the model, counted by hand: what a throughput is divided by to give a rate."""

from vit_flax.models.heads import POOLS
from vit_flax.models.vit import ViT


def forward_flops(model: ViT, grid: tuple[int, int], *, channels: int = 3, as_published: bool = False) -> float:
    """Floating-point operations of one image's logits, a multiplication and an addition counting as two.

    Matrix products only: patch embedding, projections, attention, feed-forward layers, head. A training step is
    counted as three times as much (one pass forward, two backward).

    Args:
      model: its sizes are read.
      grid: rows and columns of patches.
      channels: of the image.
      as_published: counts the last block for all tokens, as papers and other libraries do; else, as `Encoder` computes
        it, for those that the pooling reads (keys and values for all).
    """
    ph, pw = model.patch_shape
    patches = grid[0] * grid[1]
    n, d = patches + model.num_prefix_tokens, model.width
    inner = model.num_heads * (model.head_dim or d // model.num_heads)
    layers_of_mlp = 3 if model.mlp == "swiglu" else 2

    def block(queries: int) -> int:
        keys_and_values, others = 2 * d * inner, 2 * d * inner + layers_of_mlp * d * model.mlp_dim
        return n * keys_and_values + queries * others + 2 * queries * n * inner

    last = n if as_published else POOLS[model.pool].reads or n
    products = patches * ph * pw * channels * d + (model.depth - 1) * block(n) + block(last)
    if model.pool == "map":
        products += 2 * (patches + 1) * d * inner + 2 * patches * inner + layers_of_mlp * d * model.mlp_dim
    pooled, features = {"tok_dist": 2, "none": n}.get(model.pool, 1), d * (2 if model.pool == "tok_gap" else 1)
    if model.representation_size is not None:
        products += pooled * features * model.representation_size
        features = model.representation_size
    return 2.0 * (products + pooled * features * (model.num_classes or 0))
