"""Cases in the format of Meta's original files. Meta's code cannot be installed; the reference is timm's, renamed.

A model of timm with random weights computes the outputs, and its tensors are written under Meta's names, with what else
Meta's files hold: a mask token, a decoder, a mask of the biases, the periods of the rotations. Where the original code
resizes the position table otherwise than timm does, PyTorch does that here.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vit_flax.convert.parity.case import Case, Reference, random_tensor
from vit_flax.convert.parity.timm import fill, import_timm, reference_of
from vit_flax.convert.resample import Grid
from vit_flax.convert.table import renaming

State = dict[str, Any]


def build(
    architecture: str, arguments: dict[str, Any], rename: Callable[..., State], resize: dict[str, Any], seed: int
) -> Reference:
    """A model of timm with random weights that is written as a file of Meta's.

    Args:
      architecture: of timm.
      arguments: of its constructor.
      rename: (timm's tensors, random generator) -> Meta's.
      resize: how the original code resizes the position table: `antialias` and `offset` in patches.
      seed: of the weights.
    """
    import torch

    model = import_timm().create_model(architecture, **arguments).eval()
    fill(model, seed)
    state = rename({k: v.clone() for k, v in model.state_dict().items()}, np.random.default_rng(seed + 1))
    if "rope_embed.periods" in state:
        model.rope.periods.copy_(state["rope_embed.periods"].float())

    def write(folder: Path) -> Path:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
        if model.embed_dim % 64:  # no published width
            (folder / "config.json").write_text(json.dumps({"num_heads": model.blocks[0].attn.num_heads}))
        return folder

    def apply(images: np.ndarray) -> np.ndarray:
        size, at_size = images.shape[1:3], model
        if size != tuple(model.patch_embed.img_size) and model.pos_embed is not None:
            table = model.pos_embed
            at_size = copy.deepcopy(model)
            at_size.set_input_size(size)
            at_size.pos_embed = torch.nn.Parameter(
                _resize(table, model.patch_embed.grid_size, at_size.patch_embed.grid_size, **resize)
            )
        return reference_of(at_size).apply(images)

    return Reference(write=write, apply=apply)


def _resize(table: Any, old: Grid, new: Grid, *, antialias: bool, offset: float) -> Any:
    """As `interpolate_pos_encoding` of DINOv2 and its kin: a scale where there is an offset, else a size."""
    import torch

    slots = table.shape[1] - old[0] * old[1]
    grid = table[:, slots:].detach().reshape(1, *old, -1).permute(0, 3, 1, 2)
    target = (
        {"scale_factor": tuple((n + offset) / o for n, o in zip(new, old, strict=True))} if offset else {"size": new}
    )
    grid = torch.nn.functional.interpolate(grid, **target, mode="bicubic", antialias=antialias)
    assert tuple(grid.shape[2:]) == tuple(new)
    return torch.cat([table[:, :slots].detach(), grid.flatten(2).transpose(1, 2)], dim=1)


def _random(rng: np.random.Generator, *shape: int) -> Any:
    import torch

    return torch.from_numpy(random_tensor("token", shape, rng))


def _dinov2(state: State, rng: np.random.Generator) -> State:
    width = state["cls_token"].shape[-1]
    if "reg_token" in state:  # timm has added the first position to the class token
        position = _random(rng, 1, 1, width)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = _concatenate([position, state["pos_embed"]], 1)
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    names = {"^reg_token$": "register_tokens"}
    names |= {r"mlp\.fc1\.": "mlp.w12.", r"mlp\.fc2\.": "mlp.w3."} if gated else {}
    return renaming(*names.items())(state) | {"mask_token": _random(rng, 1, width)}


def _dinov3(state: State, rng: np.random.Generator, *, periods: str) -> State:
    import torch

    width = state["cls_token"].shape[-1]
    names = {r"^reg_token$": "storage_tokens", r"gamma_(\d)": r"ls\1.gamma"}
    if "blocks.0.mlp.fc1_g.weight" in state:
        names |= {r"mlp\.fc1_g\.": "mlp.w1.", r"mlp\.fc1_x\.": "mlp.w2.", r"mlp\.fc2\.": "mlp.w3."}
    for name in [name for name in state if name.endswith("q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        fused, keep = name.replace("q_bias", "qkv.bias"), torch.ones_like(query)
        state[fused] = torch.cat([query, _random(rng, width), value])  # the mask hides what is in the middle
        state[f"{fused}_mask"] = torch.cat([keep, 0 * keep, keep])
    head_dim = width // 2 if width == _TINY["embed_dim"] else 64
    waves = 100.0 ** (torch.arange(head_dim // 4) * 4 / head_dim)
    return renaming(*names.items())(state) | {
        "mask_token": _random(rng, 1, width),
        "rope_embed.periods": waves.to(getattr(torch, periods)),
        "local_cls_norm.weight": _random(rng, width),
    }


def _mae(state: State, rng: np.random.Generator, *, decoder: bool) -> State:
    width = state["cls_token"].shape[-1]
    shapes = {"mask_token": (1, 1, 8), "decoder_embed.weight": (8, width), "decoder_blocks.0.norm1.weight": (8,)}
    return state | ({name: _random(rng, *shape) for name, shape in shapes.items()} if decoder else {})


def _deit3(state: State, rng: np.random.Generator) -> State:
    return renaming((r"ls(\d)\.gamma", r"gamma_\1"))(state)


def _concatenate(tensors: list[Any], axis: int) -> Any:
    import torch

    return torch.cat(tensors, dim=axis)


_TINY = dict(embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, patch_size=4, num_classes=0, img_size=(16, 16))
_OFFSET, _SMOOTH, _PLAIN = (
    dict(antialias=False, offset=0.1),
    dict(antialias=True, offset=0.0),
    dict(antialias=False, offset=0.0),
)


def _case(
    family: str,
    name: str,
    architecture: str,
    rename: Callable[..., State],
    resize: dict[str, Any],
    *,
    sizes: tuple[Grid, ...] = ((16, 16), (24, 8)),
    named: bool = False,
    full_size: bool = False,
    **arguments: Any,
) -> Case:
    made = partial(build, architecture, arguments if full_size else {**_TINY, **arguments}, rename, resize)
    load = {"family": family} if named else {}
    return Case(family, name, "timm", made, sizes, load=load, full_size=full_size)


CASES: list[Case] = [
    _case("meta:dinov2", "DINOv2", "vit_base_patch14_dinov2", _dinov2, _OFFSET),
    _case("meta:dinov2", "DINOv2 with registers", "vit_base_patch14_reg4_dinov2", _dinov2, _SMOOTH),
    _case("meta:dinov2", "DINOv2 giant", "vit_giant_patch14_dinov2", _dinov2, _OFFSET, mlp_ratio=4),
    _case(
        "meta:dinov3", "DINOv3", "vit_base_patch16_dinov3_qkvb", partial(_dinov3, periods="bfloat16"), _PLAIN,
        global_pool="token",
    ),
    _case(
        "meta:dinov3", "DINOv3 gated", "vit_small_plus_patch16_dinov3_qkvb", partial(_dinov3, periods="float32"),
        _PLAIN, global_pool="token",
    ),
    _case(
        "meta:dinov3", "DINOv3 gated, no biases", "vit_7b_patch16_dinov3", partial(_dinov3, periods="bfloat16"), _PLAIN,
        global_pool="token",
    ),
    _case("meta:mae", "MAE with its decoder", "vit_base_patch16_224", partial(_mae, decoder=True), _PLAIN),
    _case(
        "meta:mae", "MAE fine-tuned", "vit_base_patch16_224", partial(_mae, decoder=False), _PLAIN,
        global_pool="avg", num_classes=5, named=True,
    ),
    _case("meta:deit3", "DeiT III", "deit3_base_patch16_224", _deit3, _PLAIN, num_classes=5),
    _case(
        "meta:dinov2", "DINOv2 S/14", "vit_small_patch14_dinov2", _dinov2, _OFFSET,
        sizes=((518, 518), (224, 224)), full_size=True,
    ),
    _case(
        "meta:dinov3", "DINOv3 S+/16", "vit_small_plus_patch16_dinov3_qkvb", partial(_dinov3, periods="bfloat16"),
        _PLAIN, sizes=((256, 256),), full_size=True, num_classes=0, global_pool="token",
    ),
    _case(
        "meta:mae", "MAE B/16, fine-tuned", "vit_base_patch16_224", partial(_mae, decoder=False), _PLAIN,
        sizes=((224, 224), (384, 384)), full_size=True, global_pool="avg", named=True,
    ),
    _case(
        "meta:deit3", "DeiT III S/16", "deit3_small_patch16_224", _deit3, _PLAIN,
        sizes=((224, 224), (384, 384)), full_size=True,
    ),
]  # fmt: skip
