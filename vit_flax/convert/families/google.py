"""The .npz files of google-research/vision_transformer ("google") and of google-research/big_vision ("big_vision").

Both compute tanh-GELU and a LayerNorm epsilon of 1e-6, and leave neither in the file. They differ in where the class
token gets its position: in the table's first slot (google), or nowhere (big_vision).
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.source import Source, Tensor
from vit_flax.convert.table import SAME, Family, Row, Spec, convolution, positions, renaming
from vit_flax.models import ViT

_TABLE_GOOGLE = "Transformer/posembed_input/pos_embedding"
_TABLE_BIG_VISION = "pos_embedding"
_BLOCK = "Transformer/encoderblock_{i}/"

# Roots of training checkpoints and of the image tower in a pair, and the numbering of modules before Linen.
_linen_names = renaming(
    (r"^(opt/target/|params/)+", ""),
    (r"^img/", ""),
    (r"MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    (r"LayerNorm_2/", "LayerNorm_1/"),
    (r"MlpBlock_3/", "MlpBlock_0/"),
)


def _spell(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in _linen_names(tensors).items():
        if name.startswith("Transformer/encoderblock/"):  # scanned: the blocks are stacked on the first axis
            out |= _unstack(name.replace("encoderblock/", "encoderblock_{i}/"), tensor)
        else:
            out[name] = tensor
    return out


def _unstack(name: str, tensor: Tensor) -> dict[str, Tensor]:
    cache: list[np.ndarray] = []  # the member is decompressed once for all blocks

    def block(i: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if not cache:
                cache.append(tensor.read())
            return cache[0][i]

        return read

    return {
        name.replace("{i}", str(i)): dataclasses.replace(tensor, shape=tensor.shape[1:], read=block(i))
        for i in range(tensor.shape[0])
    }


def _describe(source: Source) -> Spec:
    ph, pw, channels, width = source.shape("embedding/kernel")
    _, heads, head_dim = source.shape(_BLOCK.format(i=0) + "MultiHeadDotProductAttention_0/query/kernel")
    table = next((t for t in (_TABLE_GOOGLE, _TABLE_BIG_VISION) if t in source.tensors), None)
    class_token = "cls" in source.tensors
    own_position = class_token and table == _TABLE_GOOGLE
    grid = square(source, source.shape(table)[1] - own_position) if table else None
    pool = "map" if "MAPHead_0/probe" in source.tensors else "tok" if class_token else "gap"
    return Spec(
        fields=dict(
            num_classes=source.shape("head/kernel")[1] if "head/kernel" in source.tensors else None,
            patch_size=ph if ph == pw else (ph, pw),
            width=width,
            depth=source.depth(_BLOCK),
            mlp_dim=source.shape(_BLOCK.format(i=0) + "MlpBlock_0/Dense_0/kernel")[1],
            num_heads=heads,
            head_dim=None if heads * head_dim == width else head_dim,
            posemb="learned" if table else "sincos2d",
            class_token=class_token,
            class_token_position=own_position,
            pool=pool,
            representation_size=source.shape("pre_logits/kernel")[1] if "pre_logits/kernel" in source.tensors else None,
            activation="gelu_tanh",
            norm_eps=1e-6,
        ),
        channels=channels,
        grid=grid,
        posemb_resize="bilinear_align_corners",
        patch_resize="bilinear_antialias",
        preprocess=Preprocess(
            image_size=(grid[0] * ph, grid[1] * pw) if grid else (224 // ph * ph, 224 // pw * pw),
            filter="bilinear",
            antialias=False,
        ),
        unused=(r"^txt/", r"^(t|b)$"),
    )


def square(source: Source, patches: int) -> tuple[int, int]:
    """The grid of a table of so many patches, for files that keep only their number.

    Raises: ValueError: the number is not a square.
    """
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(
            f"{source.path}: the position table has {patches} patches, which is no square grid, and the file does not "
            "say how many rows it has."
        )
    return side, side


def _rows(model: ViT) -> list[Row]:
    rows = [
        Row("cls_token/token", "cls", SAME),
        Row("patch_embed/kernel", "embedding/kernel", convolution(model.patch_size, channels_last=True)),
        Row("patch_embed/bias", "embedding/bias", SAME),
        *positions(model, _TABLE_GOOGLE if model.class_token_position and model.has_class_token else _TABLE_BIG_VISION),
        *_same("blocks/norm1", _BLOCK + "LayerNorm_0", "scale"),
        *_same("blocks/norm2", _BLOCK + "LayerNorm_1", "scale"),
        *_attention("blocks/attention", _BLOCK),
        *_mlp("blocks/mlp", _BLOCK),
        *_same("norm", "Transformer/encoder_norm", "scale"),
        Row("pool/probe", "MAPHead_0/probe", SAME),
        *_attention("pool/attention", "MAPHead_0/"),
        *_same("pool/norm", "MAPHead_0/LayerNorm_0", "scale"),
        *_mlp("pool/mlp", "MAPHead_0/"),
        *_same("pre_logits", "pre_logits"),
        *_same("head", "head"),
    ]
    # A table without a class token in the old package has the place of one with it.
    return [*rows, Row("posemb/table", _TABLE_GOOGLE, SAME)]


def _same(ours: str, theirs: str, leaf: str = "kernel") -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}", SAME), Row(f"{ours}/bias", f"{theirs}/bias", SAME)]


def _attention(ours: str, theirs: str) -> list[Row]:
    names = ("query", "key", "value", "out")
    return [r for n in names for r in _same(f"{ours}/{n}", f"{theirs}MultiHeadDotProductAttention_0/{n}")]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return _same(f"{ours}/fc1", f"{theirs}MlpBlock_0/Dense_0") + _same(f"{ours}/fc2", f"{theirs}MlpBlock_0/Dense_1")


GOOGLE = Family(
    name="google",
    about="google-research/vision_transformer .npz: the original and AugReg files, numbered as before Linen or since",
    matches=lambda source: "embedding/kernel" in source.tensors and _TABLE_GOOGLE in source.tensors,
    describe=_describe,
    rows=_rows,
    spell=_spell,
    config=lambda out: {},
    token_positions=True,
    suffix=".npz",
)
BIG_VISION = Family(
    name="big_vision",
    about="google-research/big_vision .npz: class token, GAP, MAP and SigLIP, looped or scanned, learned or sincos2d",
    matches=lambda source: "embedding/kernel" in source.tensors and _TABLE_GOOGLE not in source.tensors,
    describe=_describe,
    rows=_rows,
    spell=_spell,
    config=lambda out: {},
    token_positions=False,
    suffix=".npz",
)
