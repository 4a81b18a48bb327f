"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), whole first, parts after.

image -> patches -> linear embedding -> + positions -> class token in front -> depth x Block -> norm -> pool -> head

ViT                     equations (1) to (4) of the paper, one line each
ClassToken, Registers   tokens in front of the patches, which `patches.patchify` cuts
`encoder.Encoder`       the stack of blocks; the only place that knows about scan and remat
`block.Block`           x + attention(norm(x)), then x + mlp(norm(x))
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_flax.models import attend, heads, variants
from vit_flax.models.block import MLPS, Attention, Block
from vit_flax.models.encoder import REMAT, Encoder
from vit_flax.models.layers import ACTIVATIONS, LayerNorm, LayerScale
from vit_flax.models.linear import Linear
from vit_flax.models.patches import both_sides, patchify
from vit_flax.models.posemb import FIXED_TABLES, ROPES, Grid, LearnedPositions
from vit_flax.typing import Array, Float


class ViT(nn.Module):
    """A Vision Transformer for images `[b, h, w, c]` or for sequences of flattened patches `[b, n, p*p*c]`.

    Derivatives: reverse mode (`jax.grad`, `jax.vjp`), of any order; in bfloat16 on CPUs of the first order only.
    Forward mode (`jax.jvp`, `jax.hessian`) has no rules for the products and norms: take `jax.grad` of `jax.grad`.

    What is of interest is in `out`. Flax's own `capture_intermediates` shows the blocks stacked under scan, as `out`
    does; where the pooling does not read every token, the last block follows twice: once for the tokens that are read,
    once for all.

    Attributes:
      num_classes: size of the head's output; None for no head (the output is then the pooled features).
      patch_size: side of a patch in pixels, or (rows, columns).
      width: of a token.
      depth: number of blocks.
      mlp_dim: hidden width of the feed-forward layers.
      num_heads: of the attention.
      head_dim: width of each head; None for `width // num_heads`.
      posemb: "learned", "sincos2d" or "sincos2d_mae" (see `posemb.sincos2d`), or "none"; added to the patch tokens.
      rope: a key of `posemb.ROPES` to rotate queries and keys by position (may be combined with `posemb`), or None.
      class_token: whether a learned token is put in front; None for "if the pooling reads it".
      class_token_position: whether that token has a learned position of its own, as in equation (1) of the paper
        (`learned` positions only). It adds nothing to what the model can express, but makes the parameter count the
        published one.
      dist_token: a second learned token, read by the pooling "tok_dist" (arXiv:2012.12877).
      registers: number of learned tokens that nothing reads (arXiv:2309.16588).
      pre_norm: a LayerNorm in front of the first block (CLIP).
      norm_after_pool: the final LayerNorm is applied to the pooled features instead of to every token (MAE, BEiT).
      pool: a key of `heads.POOLS`.
      representation_size: width of a tanh layer in front of the head; None for none.
      mlp: "mlp" or "swiglu".
      mlp_norm: a LayerNorm on the hidden units of the feed-forward layer (EVA-02).
      activation: a key of `layers.ACTIVATIONS`.
      qk_norm: LayerNorm on queries and keys, per head (arXiv:2302.05442).
      qkv_bias: which of the three projections have a bias, such as "qkv", "qv" or "".
      patch_bias: whether the patch embedding has a bias.
      norm_eps: epsilon of every LayerNorm; 1e-6 in the JAX and timm families, others differ.
      layer_scale: initial factor of LayerScale; None for none.
      drop_path: probability of dropping a residual branch in training.
      drop_path_ramp: "linear" from 0 in the first block to `drop_path` in the last, or "constant" (DeiT III).
      dropout: after the embedding, the attention and both layers of the MLP, in training.
      attention_dropout: on the attention weights, in training.
      head_dropout: in front of the head, in training.
      head_bias_init: -log(num_classes) or lower starts a sigmoid loss calm.
      head_zero_init: zeros for the head's kernel (the published recipes), or a truncated normal of 0.02.
      scan: one compiled block for all layers (parameters stacked `[l, ...]` under `blocks`), or a Python loop
        (`block_0`, `block_1`, ...). Compile time does not grow with the depth where the scan is not unrolled.
      scan_unroll: blocks per turn of the scan; None: all of them on GPUs, else 1.
      remat: what the backward pass recomputes: a key of `REMAT`, or "auto", see `Encoder`.
      attention_impl: a key of `attend.IMPLEMENTATIONS`.
      return_attention: adds the attention weights to `out` (they are computed the slow way then).
      dtype: of the activations and matrix products, but the head's.
      param_dtype: of the parameters.
    """

    num_classes: int | None
    patch_size: int | tuple[int, int]
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    head_dim: int | None = None
    posemb: str = "learned"
    rope: str | None = None
    class_token: bool | None = None
    class_token_position: bool = True
    dist_token: bool = False
    registers: int = 0
    pre_norm: bool = False
    norm_after_pool: bool = False
    pool: str = "tok"
    representation_size: int | None = None
    mlp: str = "mlp"
    mlp_norm: bool = False
    activation: str = "gelu"
    qk_norm: bool = False
    qkv_bias: str = "qkv"
    patch_bias: bool = True
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_path_ramp: str = "linear"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    head_bias_init: float = 0.0
    head_zero_init: bool = True
    scan: bool = True
    scan_unroll: int | None = None
    remat: str = "auto"
    attention_impl: str = "auto"
    return_attention: bool = False
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    @classmethod
    def from_variant(cls, variant: str, *, num_classes: int | None, **overrides: Any) -> "ViT":
        """A model of a named size, such as `ViT.from_variant("B/16", num_classes=10, pool="gap")`.

        Args:
          variant: size and patch size in pixels; see `variants.SIZES`.
          num_classes: as in the class.
          **overrides: any other field of the class; also those that the variant sets.

        Raises: ValueError: unknown variant. TypeError: a field that does not exist, with the nearest name.
        """
        variants.check_fields(overrides, known=[f.name for f in fields(cls) if f.name not in ("parent", "name")])
        return cls(**{**variants.parse(variant), "num_classes": num_classes, **overrides})

    def __post_init__(self) -> None:
        variants.check_choices(
            self,
            posemb=["learned", "none", *FIXED_TABLES],
            rope=[None, *ROPES],
            pool=heads.POOLS,
            mlp=MLPS,
            activation=ACTIVATIONS,
            qkv_bias=["", "q", "k", "v", "qk", "qv", "kv", "qkv"],
            drop_path_ramp=RAMPS,
            remat=["auto", *REMAT],
            attention_impl=attend.IMPLEMENTATIONS,
        )
        variants.check_dtypes(self)
        if not isinstance(self.patch_size, int):
            # A list, which JSON makes of a pair, would make a model that cannot be hashed.
            object.__setattr__(self, "patch_size", tuple(self.patch_size))
        variants.check_sizes(self)
        super().__post_init__()

    @property
    def has_class_token(self) -> bool:
        """Whether a class token is in front of the sequence."""
        return heads.POOLS[self.pool].needs_class_token if self.class_token is None else self.class_token

    @property
    def patch_shape(self) -> Grid:
        """Rows and columns of a patch in pixels."""
        return both_sides(self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens in front of the patches: class token, distillation token, registers."""
        return self.has_class_token + self.dist_token + self.registers

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"] | Float[Array, "b n f"],
        *,
        train: bool,
        grid: Grid | None = None,
        drop_path: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "b *m"], dict[str, Any]]:
        """Classifies images.

        Args:
          images: normalised pixels, or sequences of flattened patches (row, column, channel; channel fastest).
          train: whether dropout and drop-path are on; they draw from the random stream "dropout".
          grid: rows and columns of a *sequence*, where they are not the two equal sides of a square.
          drop_path: replaces the field of that name; may be traced.

        Returns:
          Logits in float32, `[b, v]` (or the pooled features where `num_classes` is None), and `out`:
            tokens      [b, n, d]     input of the first block, prefix tokens first
            blocks      of every block, stacked on a leading axis [l]: `attention`, `mlp` (the branches, as added),
                        `residual` (the result), and `attention_weights` [k, n, n] on request
            encoded     [b, n, d]     output of the encoder (normalised unless `norm_after_pool`)
            features    [b, d]        pooled
            pre_logits  [b, r]        input of the head
            heads       logits of `token` and `dist` where the pooling is "tok_dist", else empty
          What nobody reads costs nothing under jit. That includes what the last block computes for tokens that the
          pooling does not read, except keys and values: nearly a twelfth of a B/16's arithmetic.

        Raises:
          ValueError: the patch does not divide the image, a sequence has no known grid, or the input is no picture.
          TypeError: pixels that are no floating-point numbers.
        """
        dtype, param_dtype = jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype)
        norm = partial(LayerNorm, epsilon=self.norm_eps, dtype=dtype, param_dtype=param_dtype)
        dropout = partial(nn.Dropout, deterministic=not train)
        patches, grid = patchify(images, self.patch_size, grid, needs_grid=self._needs_grid)

        # Equation (1): embed, add positions, put the class token in front.
        lecun = nn.initializers.lecun_normal()
        x = linear(self.width, use_bias=self.patch_bias, kernel_init=lecun, name="patch_embed")(patches)
        x = self._add_positions(x, grid)
        x = self._add_tokens(x)
        x = dropout(self.dropout)(x)
        if self.pre_norm:
            x = norm(name="pre_norm")(x)
        out: dict[str, Any] = {"tokens": x}

        # Equations (2) and (3): the blocks.
        head_dim = self.head_dim or self.width // self.num_heads
        padding = self._padding(x, head_dim, train)
        attention = partial(
            Attention,
            num_heads=self.num_heads,
            head_dim=head_dim,
            linear=linear,
            bias=self.qkv_bias,
            qk_norm=norm if self.qk_norm else None,
            rope=self.rope,
            dropout=partial(dropout, self.attention_dropout),
            impl=self.attention_impl,
            return_weights=self.return_attention,
            length=x.shape[1] if padding else None,
        )
        mlp = partial(
            MLPS[self.mlp],
            hidden=self.mlp_dim,
            activation=ACTIVATIONS[self.activation],
            linear=linear,
            norm=norm if self.mlp_norm else None,
            dropout=partial(dropout, self.dropout),
        )
        block = partial(
            Block,
            norm=norm,
            attention=attention,
            mlp=mlp,
            dropout=partial(dropout, self.dropout),
            layer_scale=None if self.layer_scale is None else partial(LayerScale, self.layer_scale, param_dtype),
        )
        rate = (self.drop_path if drop_path is None else drop_path) if train else None
        rates = None if rate is None or (isinstance(rate, int | float) and rate == 0) else self._ramp() * rate
        rotation = ROPES[self.rope].angles(grid, head_dim) if self.rope else None
        encoder = Encoder(block, self.depth, self.scan, self.scan_unroll, self.remat, padding, name="encoder")
        nn.share_scope(self, encoder)  # the blocks' parameters are `blocks/...`, not `encoder/blocks/...`
        x, read, out["blocks"] = encoder(x, rates, rotation, heads.POOLS[self.pool].reads)

        # Equation (4): normalise, pool, classify.
        final_norm = (lambda x: x) if self.norm_after_pool else norm(name="norm")
        out["encoded"] = final_norm(x)
        x = final_norm(read)
        pool = heads.POOLS[self.pool].make(
            prefix=self.num_prefix_tokens,
            attention=partial(attention, rope=None, qk_norm=None, bias="qkv", return_weights=False, length=None),
            mlp=partial(mlp, norm=None),
            norm=norm,
        )
        x = pool(x)
        if self.norm_after_pool:
            x = norm(name="norm")(x)
        out["features"] = x
        if self.representation_size is not None:
            x = jnp.tanh(linear(self.representation_size, name="pre_logits")(x))
        out["pre_logits"] = x
        if self.num_classes is None:
            return x.astype(jnp.float32), out
        head = partial(
            linear,
            self.num_classes,
            dtype=jnp.dtype("float32"),  # one vector per image: the precision of the logits costs nothing
            kernel_init=nn.initializers.zeros if self.head_zero_init else nn.initializers.truncated_normal(0.02),
            bias_init=nn.initializers.constant(self.head_bias_init),
        )
        x = dropout(self.head_dropout)(x)
        logits, out["heads"] = heads.classify(x, head, pool=self.pool)
        return logits, out

    @property
    def _needs_grid(self) -> bool:
        return self.rope is not None or self.posemb in FIXED_TABLES

    def _padding(self, x: Float[Array, "b n d"], head_dim: int, train: bool) -> int:
        if self.return_attention or (train and self.attention_dropout > 0):
            return 0  # the weights are in the open, and `attend` has no part in it
        heads = jax.ShapeDtypeStruct((*x.shape[:2], self.num_heads, head_dim), x.dtype)
        return attend.padding(heads, impl=self.attention_impl)

    def _ramp(self) -> Float[Array, "l"]:
        return jnp.asarray(RAMPS[self.drop_path_ramp](self.depth), jnp.float32)

    def _add_positions(self, x: Float[Array, "b n d"], grid: Grid) -> Float[Array, "b n d"]:
        if self.posemb == "learned":
            return LearnedPositions(jnp.dtype(self.param_dtype), name="posemb")(x)
        if self.posemb == "none":
            return x
        return x + jnp.asarray(FIXED_TABLES[self.posemb](grid, self.width), x.dtype)[None]

    def _add_tokens(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        param_dtype = jnp.dtype(self.param_dtype)
        position = self.class_token_position and self.posemb == "learned"
        if self.registers:
            x = Registers(self.registers, param_dtype, name="registers")(x)
        if self.dist_token:
            x = ClassToken(position, param_dtype, name="dist_token")(x)
        if self.has_class_token:
            x = ClassToken(position, param_dtype, name="cls_token")(x)
        return x


RAMPS: dict[str, Callable[[int], list[float]]] = {
    "linear": lambda depth: [i / max(depth - 1, 1) for i in range(depth)],
    "constant": lambda depth: [1.0] * depth,
}


class ClassToken(nn.Module):
    """A learned token in front of the sequence, with a learned position of its own where `position` is set."""

    position: bool
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """Returns the sequence, one longer."""
        b, _, d = x.shape
        token = self.param("token", nn.initializers.zeros, (1, 1, d), self.param_dtype)
        if self.position:
            token = token + self.param("position", nn.initializers.normal(0.02), (1, 1, d), self.param_dtype)
        return jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (b, 1, d)), x], axis=1)


class Registers(nn.Module):
    """Learned tokens in front of the sequence that give the model room to compute (arXiv:2309.16588)."""

    number: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """Returns the sequence, `number` longer."""
        b, _, d = x.shape
        tokens = self.param("tokens", nn.initializers.normal(1e-6), (1, self.number, d), self.param_dtype)
        return jnp.concatenate([jnp.broadcast_to(tokens.astype(x.dtype), (b, self.number, d)), x], axis=1)
