"""Cases whose reference is timm: its architectures read, and models of ours written and then opened by timm."""

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_flax.convert.parity.case import Case, Reference, random_tensor
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.resample import Grid
from vit_flax.convert.save import save_pretrained
from vit_flax.models import ViT


def build(architecture: str, arguments: dict[str, Any], seed: int) -> Reference:
    """A model of timm with random weights.

    Args:
      architecture: as in `timm.list_models()`.
      arguments: of its constructor.
      seed: of the weights.
    """
    model = import_timm().create_model(architecture, **arguments).eval()
    fill(model, seed)
    return reference_of(model)


def build_written(fields: dict[str, Any], image_size: Grid, seed: int) -> Reference:
    """A model of ours with random weights, as timm computes it after `save_pretrained(family="timm")`.

    Args:
      fields: of `ViT`; those of a tiny model are filled in.
      image_size: rows and columns in pixels.
      seed: of the weights.
    """
    tiny = dict(num_classes=5, patch_size=4, width=24, depth=2, mlp_dim=48, num_heads=2)
    model = ViT(**{**tiny, **fields})
    image = jax.ShapeDtypeStruct((1, *image_size, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False)["params"], image)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(
            Path(scratch) / "model", model, params, family="timm", preprocess=Preprocess(image_size)
        )
        opened = import_timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
        files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def write(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    return Reference(write=write, apply=reference_of(opened).apply)


def reference_of(model: Any) -> Reference:
    """A timm model as it is."""
    import torch

    def write(folder: Path) -> Path:
        return save(model, folder)

    def apply(images: np.ndarray) -> np.ndarray:
        size = images.shape[1:3]
        at_size = model
        if size != tuple(model.patch_embed.img_size):
            at_size = copy.deepcopy(model)
            at_size.set_input_size(size)
        with torch.no_grad():
            return at_size(_to_torch(images)).numpy()

    def gradients(images: np.ndarray, cotangent: np.ndarray, folder: Path) -> Path:
        differentiated = copy.deepcopy(model)
        (differentiated(_to_torch(images)) * torch.from_numpy(cotangent)).sum().backward()
        for parameter in differentiated.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return save(differentiated, folder)

    return Reference(write=write, apply=apply, gradients=gradients)


def save(model: Any, folder: Path) -> Path:
    """A folder as timm's own `push_to_hf_hub` fills it."""
    import_timm().models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def fill(model: Any, seed: int) -> None:
    """Replaces every weight of a PyTorch model by `random_tensor`."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape), rng)))


def _to_torch(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


_LIBRARIES: list[Any] = []  # PyTorch forgets what was defined when the object goes


def import_timm() -> Any:
    """timm, also where the compiled half of torchvision does not fit the PyTorch that is installed (a CPU build)."""
    import torch

    try:
        import timm
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _LIBRARIES[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    return timm


def _tiny(architecture: str, image_sizes: tuple[Grid, ...] = ((16, 24), (24, 16)), **arguments: Any) -> Case:
    tiny = dict(embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, patch_size=4, img_size=image_sizes[0], num_classes=5)
    name = ", ".join([architecture, *(f"{key}={value}" for key, value in arguments.items())])
    return Case("timm", name, "timm", partial(build, architecture, {**tiny, **arguments}), image_sizes)


def _full(architecture: str, size: int) -> Case:
    name = f"{architecture}, full size"
    return Case("timm", name, "timm", partial(build, architecture, {}), ((size, size),), full_size=True)


def _written(name: str, **fields: Any) -> Case:
    return Case("timm", f"ours to timm: {name}", "timm", partial(build_written, fields, (16, 24)), ((16, 24),))


CASES: list[Case] = [
    _tiny("vit_base_patch16_224"),
    _tiny("vit_base_patch16_224", global_pool="avg"),  # as MAE is fine-tuned
    _tiny("vit_medium_patch16_gap_240"),  # no bias of queries, keys and values; norm before the pooling
    _tiny("vit_base_patch16_reg4_gap_256"),
    _tiny("deit_base_distilled_patch16_224"),
    _tiny("deit3_base_patch16_224"),
    _tiny("vit_base_patch14_dinov2", num_classes=0),
    _tiny("vit_base_patch14_reg4_dinov2", num_classes=0),
    _tiny("vit_giant_patch14_dinov2", mlp_ratio=4),
    _tiny("vit_base_patch16_siglip_224"),
    _tiny("vit_base_patch32_siglip_256"),  # with tanh-GELU
    _tiny("vit_base_patch16_siglip_gap_224"),
    _tiny("vit_base_patch16_clip_224"),
    _tiny("vit_base_patch16_clip_quickgelu_224"),
    _tiny("vit_base_patch16_dinov3"),
    _tiny("vit_base_patch16_dinov3_qkvb"),
    _tiny("vit_small_plus_patch16_dinov3"),  # gated
    _tiny("eva02_small_patch14_224"),
    _tiny("eva02_base_patch14_224"),
    _tiny("eva_giant_patch14_224"),
    _tiny("vit_medium_patch16_rope_reg1_gap_256"),
    _written("class token", pool="tok", activation="gelu_tanh"),
    _written("GAP and registers", pool="gap", registers=2, layer_scale=0.1),
    _written("class token with a position, registers", registers=2),
    _written("distillation token", pool="tok_dist", dist_token=True, class_token_position=False),
    _written("MAP and CLIP's norm", pool="map", pre_norm=True, patch_bias=False, norm_eps=1e-5),
    _written("every token by itself", pool="none", qk_norm=True, qkv_bias="", mlp_norm=True),
    _written("gated", mlp="swiglu", activation="silu", norm_after_pool=True, pool="gap", mlp_dim=40),
    _written("rotated as DINOv3, all biases", rope="dinov3", posemb="none", registers=4, norm_eps=1e-5),
    _written("rotated as EVA-02, gated", rope="eva", mlp="swiglu", activation="silu", mlp_norm=True, mlp_dim=53),
    _written("no positions, patches of 4 x 8", posemb="none", pool="gap", patch_size=(4, 8)),
    _full("vit_small_patch16_224", 224),
    _full("deit_small_distilled_patch16_224", 224),
    _full("deit3_small_patch16_224", 224),
    _full("vit_small_patch14_dinov2", 518),
    _full("vit_small_patch14_reg4_dinov2", 518),
    _full("vit_base_patch16_siglip_224", 224),
    _full("vit_base_patch32_clip_quickgelu_224", 224),
    _full("vit_small_plus_patch16_dinov3", 256),
    _full("eva02_small_patch14_224", 224),
]
