"""Makes timm_* and meta_*: `PYTHONPATH=. python tests/golden/make_timm.py`, where timm 1.0.31 and torch are installed
beside the dependencies of this package.

timm_NAME/, meta_NAME/    a tiny checkpoint of `vit_flax.convert.parity.timm` or `.meta`, which say how Meta's are made;
                          written.json is the config.json that we write for the same model
timm_NAME.io.npz          "image:HxW" and what timm computes of it, "output:HxW", for every image size of the case
timm_adapted.npz          outputs of the first case opened with other channels and with other patches
timm_preprocess.npz       a picture and what timm's transforms for evaluation make of it, by the JSON of their arguments
timm_architectures.json   of every architecture, the facts that timm's files leave out; null where we have no such model

A written.json is kept only after timm has opened the folder that it belongs to and computed the same, and has opened it
with another number of classes.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image

from vit_flax.convert import load_pretrained, save_pretrained
from vit_flax.convert.parity import meta
from vit_flax.convert.parity import timm as ours

HERE = Path(__file__).parent
TOLERANCE = 1e-5
timm = ours.import_timm()


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    for prefix, cases in (("timm", ours.CASES), ("meta", meta.CASES)):
        for case in cases:
            if not case.full_size:
                folder = HERE / re.sub(r"\W+", "_", f"{prefix}_{case.name}").lower()
                io = make(case, folder)
                if prefix == "timm":
                    prove_written(folder, *io[:2])
    make_adapted(HERE / "timm_vit_base_patch16_224")
    make_preprocessed()
    architectures = {name: facts(name) for module in MODULES for name in timm.list_models(module=module)}
    lines = (f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(architectures.items()))
    (HERE / "timm_architectures.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make(case: Any, folder: Path) -> list[np.ndarray]:
    """The checkpoint, and the file of images and outputs, whose arrays come back in order."""
    reference = case.build(0)
    folder.mkdir(exist_ok=True)
    reference.write(folder)
    rng = np.random.default_rng(1)
    io = {}
    for h, w in case.image_sizes:
        io[f"image:{h}x{w}"] = image = rng.standard_normal((1, h, w, 3), np.float32)
        io[f"output:{h}x{w}"] = reference.apply(image)
    np.savez_compressed(f"{folder}.io.npz", **io)
    return list(io.values())


def prove_written(folder: Path, image: np.ndarray, output: np.ndarray) -> None:
    """Has timm open what we write for a checkpoint."""
    loaded = load_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        written = save_pretrained(
            Path(scratch) / "out", loaded.model, loaded.params, family="timm", preprocess=loaded.preprocess
        )
        opened, other_head = (
            timm.create_model(f"local-dir:{written}", pretrained=True, **arguments).eval()
            for arguments in ({}, {"num_classes": 7})
        )
        (folder / "written.json").write_bytes((written / "config.json").read_bytes())
    batch = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        difference = np.abs(opened(batch).numpy() - output).max()
        assert difference < TOLERANCE, folder.name
        assert torch.equal(opened.forward_features(batch), other_head.forward_features(batch))
        assert other_head(batch).shape[-1] == 7
    print(f"{folder.name}: timm opens what we write, {difference:.1e}")


def make_adapted(folder: Path) -> None:
    out = {}
    rng = np.random.default_rng(2)
    for key, size, arguments in (
        ("channels:1", (16, 24), dict(in_chans=1)),
        ("channels:4", (16, 24), dict(in_chans=4)),
        ("patch:6", (24, 36), dict(patch_size=6, img_size=(24, 36))),
        ("patch:2", (12, 8), dict(patch_size=2, img_size=(12, 8))),
    ):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
        image = rng.standard_normal((1, *size, arguments.get("in_chans", 3)), np.float32)
        with torch.no_grad():
            output = model(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
        out |= {f"image:{key}": image, f"output:{key}": output}
    np.savez_compressed(HERE / "timm_adapted.npz", **out)


def make_preprocessed() -> None:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC))
    out = {"picture": picture}
    for crop_pct, crop_mode, interpolation in (
        (0.9, "center", "bicubic"),
        (0.875, "center", "bilinear"),
        (1.0, "squash", "bicubic"),
        (0.95, "squash", "bicubic"),
    ):
        card = dict(
            mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_pct=crop_pct, crop_mode=crop_mode,
            interpolation=interpolation,
        )  # fmt: skip
        transform = timm.data.create_transform((3, 40, 40), is_training=False, **card)
        out[json.dumps(card)] = transform(Image.fromarray(picture)).numpy().transpose(1, 2, 0)
    np.savez_compressed(HERE / "timm_preprocess.npz", **out)


MODULES = ("vision_transformer", "deit", "eva")
BLOCKS = ("Block", "EvaBlock")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
POOLS = {"token": "tok", "avg": "gap", "map": "map"}


def facts(name: str) -> dict[str, Any] | None:
    """What a built model says about itself."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    block = model.blocks[0]
    kind = lambda module: type(module).__name__  # noqa: E731
    norms = {(kind(m), m.eps) for m in model.modules() if "Norm" in kind(m) and hasattr(m, "eps")}
    rope = rope_kind(model)
    ours = (
        kind(block) in BLOCKS
        and kind(block.attn) in ATTENTIONS
        and kind(block.attn.norm) == "Identity"
        and {norm for norm, _ in norms} == {"LayerNorm"}
        and len(norms) == 1
        and rope != "other"
        and (kind(model.norm), kind(model.fc_norm)).count("Identity") == 1
        and not (getattr(model, "pool_include_prefix", False) and model.num_prefix_tokens)
        and getattr(block.attn, "num_kv_heads", block.attn.num_heads) == block.attn.num_heads
    )
    if not ours:
        return None
    slots = 0 if model.pos_embed is None else model.pos_embed.shape[1] - model.patch_embed.num_patches
    if slots > 0 and model.reg_token is not None:
        return None
    found = dict(
        width=model.embed_dim,
        num_heads=block.attn.num_heads,
        norm_eps=norms.pop()[1],
        activation=ACTIVATIONS[kind(block.mlp.act)],
        pool=POOLS[model.global_pool],
        rope=rope,
        gated=kind(block.mlp) in ("GluMlp", "SwiGLU"),
    )
    if model.cls_token is not None and model.pos_embed is not None:
        found["class_token_position"] = slots > 0
    return found


def rope_kind(model: Any) -> str | None:
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    seen = (type(rope).__name__, rope.temperature, rope.grid_indexing, getattr(rope, "grid_offset", None))
    if seen == ("RotaryEmbeddingDinoV3", 100.0, "ij", 0.0) and rope.rotate_half:
        return "dinov3"
    if seen == ("RotaryEmbeddingCat", 10000.0, "ij", 0.0) and rope.ref_feat_shape == (16, 16) and not rope.rotate_half:
        return "eva"
    return "other"


if __name__ == "__main__":
    main()
