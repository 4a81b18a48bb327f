"""What timm 1.0.31 knows from the name of an architecture and leaves out of its files.

A name such as vit_base_patch16_clip_quickgelu_224 is read word by word; every word adds facts to those of the words in
front of it. A word that is not known is an error: a guess would change the outputs and nothing else would show it.
tests/golden/timm_architectures.json holds the facts of every architecture, as the built models have them.
"""

import re
from typing import Any

Facts = dict[str, Any]

# Fields of `ViT`, and the names of the resize methods.
DEFAULTS: Facts = dict(
    norm_eps=1e-6, pool="tok", rope=None, class_token_position=True,
    posemb_resize="bicubic_antialias", patch_resize="bicubic_antialias",
)  # fmt: skip
WORDS: dict[str, Facts] = {
    "vit": {},
    "deit": {},
    "deit3": dict(class_token_position=False),
    "eva": dict(pool="gap"),
    "eva02": dict(pool="gap", rope="eva"),
    "flexivit": dict(class_token_position=False, posemb_resize="bilinear", patch_resize="bilinear"),
    "test": {},
    # Sizes. The number of heads is what a file of weights does not show.
    "tiny": dict(width=192, num_heads=3),
    "wee": dict(width=256, num_heads=4),
    "xsmall": dict(width=256, num_heads=4),
    "little": dict(width=320, num_heads=5),
    "small": dict(width=384, num_heads=6),
    "medium": dict(width=512, num_heads=8),
    "mediumd": dict(width=512, num_heads=8),
    "betwixt": dict(width=640, num_heads=10),
    "base": dict(width=768, num_heads=12),
    "so400m": dict(width=1152, num_heads=16),
    "large": dict(width=1024, num_heads=16),
    "huge": dict(width=1280, num_heads=16),
    "giant": dict(width=1408, num_heads=16),
    "giantopt": dict(width=1536, num_heads=16),
    "gigantic": dict(width=1664, num_heads=16),
    "7b": dict(width=4096, num_heads=32),
    # Kinds.
    "distilled": {},
    "dinov2": {},
    "tipsv2": dict(class_token_position=False),
    "miil": {},
    "36x1": {},
    "clip": dict(norm_eps=1e-5),
    "quickgelu": dict(activation="quick_gelu"),
    "siglip": dict(pool="map"),
    "map": dict(pool="map"),
    "gap": dict(pool="gap"),
    "rope": dict(pool="gap", rope="eva"),
    "dinov3": dict(norm_eps=1e-5, pool="gap", rope="dinov3"),
    "lingbot": dict(norm_eps=1e-5, rope="dinov3"),
    "qkvb": {},
    "plus": {},
}
_SHAPES = re.compile(r"patch\d+|reg\d+|\d{3}")  # words that the tensors say themselves

# What the words do not say, by pattern of the whole name.
SPECIAL: dict[str, Facts] = {
    r"vit_.*_reg4_dinov2": dict(class_token_position=False),
    r"vit_base_patch16_gap_224": dict(num_heads=16),
    r"vit_base_patch\d+_plus_.*": dict(width=896, num_heads=14),
    r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)": dict(width=1536, num_heads=24),
    r"vit_giant_patch16_lingbot": dict(width=1536, num_heads=24),
    r"vit_huge_plus_patch16_dinov3(_qkvb)?": dict(num_heads=20),
    r"vit_base_patch32_siglip_.*": dict(activation="gelu_tanh"),
    r"vit_large_patch16_siglip_(gap_)?512": dict(activation="gelu_tanh"),
    r"vit_so400m_patch16_siglip_.*": dict(activation="gelu_tanh"),
    r"vit_giantopt_patch16_siglip_.*": dict(activation="gelu_tanh"),
    r"eva_giant_patch14_clip_224": dict(norm_eps=1e-6, pool="tok"),
    r"test_vit": dict(width=64, num_heads=2),
}

# What this model does not compute, and what it is.
REFUSED: dict[str, str] = {
    r"aimv2_.*|vit_.*_sapiens2|test_vit4": "it normalises by the root mean square",
    r"vit_.*_xp_.*|vit_(dp|p)wee_.*|vit_.*_18x2_.*": "its blocks run attention and MLP side by side",
    r"vit_(dwee|dlittle)_.*": "its attention is differential",
    r"vit_.*_rpn_.*|eva02_enormous_.*": "it normalises behind the branches",
    r"beit3_.*|eva02_(base|large)_.*_clip_.*": "it normalises inside the attention",
    r"vit_.*_radio_v\d|vit_intern300m_.*|vit_pe_(lang|spatial)_.*": "it has no final norm",
    r"vit_.*_rope_(mixed_)?(ape_)?224|vit_pe_core_.*": "its rotations are of another kind than DINOv3's and EVA-02's",
    r"vit_so150m2?_.*|test_vit2": "its registers have positions of their own",
    r"test_vit3": "it pools over the registers as well",
}


# timm's arguments for the rotations that we have.
ROPES: dict[str | None, dict[str, Any]] = {
    None: dict(use_rot_pos_emb=False),
    "dinov3": dict(
        use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100.0, rope_rotate_half=True,
        rope_grid_indexing="ij", rope_grid_offset=0.0, ref_feat_shape=None,
    ),
    "eva": dict(
        use_rot_pos_emb=True, rope_type="cat", rope_temperature=10000.0, rope_rotate_half=False,
        rope_grid_indexing="ij", rope_grid_offset=0.0, ref_feat_shape=[16, 16],
    ),
}  # fmt: skip
POOLS = {"token": "tok", "avg": "gap", "map": "map", "": "none"}
ACTIVATIONS = {name: name for name in ("gelu", "gelu_tanh", "quick_gelu", "silu")}


def facts_of(architecture: str) -> Facts:
    """The facts that timm derives from the name of an architecture.

    Args:
      architecture: as in `timm.list_models()`, without a tag.

    Returns: fields of `ViT` that the tensors do not show (and the width, to compare), and the two resize methods.

    Raises: ValueError: this model cannot compute what the architecture computes, or the name is not known.
    """
    for pattern, reason in REFUSED.items():
        if re.fullmatch(pattern, architecture):
            raise ValueError(f"timm's {architecture} is not supported: {reason}.")
    facts = dict(DEFAULTS)
    words = architecture.split("_")
    for word in words:
        if word in WORDS:
            facts |= WORDS[word]
        elif not _SHAPES.fullmatch(word) and architecture not in SPECIAL:
            raise ValueError(
                f"timm's {architecture} is not known here (its part {word!r}). If it computes the same as a known "
                "architecture, name that one: family='timm:vit_base_patch16_224'."
            )
    for pattern, special in SPECIAL.items():
        if re.fullmatch(pattern, architecture):
            facts |= special
    if "num_heads" not in facts or words[0] not in ("vit", "deit", "deit3", "eva", "eva02", "flexivit", "test"):
        raise ValueError(f"timm's {architecture} is not known here.")
    return facts
