"""The cases whose reference is transformers: every class that is read, tiny, and a published size of every family."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vit_flax.convert.parity.case import Case, Reference, random_tensor
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import PREPROCESSOR, WEIGHTS

# What is compared, for a model, pixels [b, c, h, w] and further arguments of the call.
Output = Callable[..., Any]


def _logits(model: Any, pixels: Any, **more: bool) -> Any:
    return model(pixels, **more).logits


def _pooled(model: Any, pixels: Any, **more: bool) -> Any:
    return model(pixels, **more).pooler_output


def _projected(model: Any, pixels: Any, **more: bool) -> Any:
    return model(pixels, **more).image_embeds


def _features_of_pair(model: Any, pixels: Any, **more: bool) -> Any:
    return model.get_image_features(pixel_values=pixels, **more).pooler_output


def _unmasked_tokens(model: Any, pixels: Any, **more: bool) -> Any:
    """Of a masked autoencoder that hides no patch and keeps their order."""
    import torch

    encoder = model.vit if hasattr(model, "vit") else model
    patch = model.config.patch_size
    order = torch.arange(pixels.shape[2] // patch * (pixels.shape[3] // patch), dtype=torch.float32)
    return encoder(pixels, noise=order.repeat(len(pixels), 1), **more).last_hidden_state


def _build(
    seed: int,
    name: str,
    config: Mapping[str, Any],
    *,
    output: Output = _logits,
    processor: Mapping[str, Any],
    own_size: Grid,
    interpolate: bool = True,
    in_memory: bool = False,
    gradients: bool = False,
) -> Reference:
    """One model of transformers.

    Args:
      seed: of the weights.
      name: of the class.
      config: arguments of its configuration class.
      output: what is compared.
      processor: the contents of preprocessor_config.json.
      own_size: rows and columns of the images that the position table is for.
      interpolate: whether another image size has to be asked for; DINOv2 and DINOv3 take any.
      in_memory: writes the names of the modules instead of those of `save_pretrained`.
      gradients: whether they are compared too.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    rng = np.random.default_rng(seed)
    scale = 1.0 if gradients else 0.02
    model.load_state_dict({key: _tensor(key, value, rng, scale) for key, value in model.state_dict().items()})

    def run(images: np.ndarray) -> Any:
        asked = {"interpolate_pos_encoding": True} if interpolate and images.shape[1:3] != own_size else {}
        return output(model, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), **asked)

    def apply(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return run(images).numpy()

    def write(folder: Path) -> Path:
        model.save_pretrained(folder)
        if in_memory:
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / PREPROCESSOR).write_text(json.dumps(processor, indent=2))
        return folder

    def write_gradients(images: np.ndarray, cotangent: np.ndarray, folder: Path) -> Path:
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        model.zero_grad()
        (run(images) * torch.from_numpy(cotangent)).sum().backward()
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        write(folder)
        model.load_state_dict(weights)
        return folder

    return Reference(write, apply, write_gradients if gradients else None)


def _tensor(key: str, like: Any, rng: np.random.Generator, embeddings: float) -> Any:
    """Random; a small factor in front of the embeddings shows a wrong epsilon, and would blow up their gradients."""
    import torch

    value = torch.tensor(np.asarray(random_tensor(key, tuple(like.shape), rng)))
    return embeddings * value if "embeddings." in key else value


_IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
_HALF = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
_OPENAI = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
_COMMON = dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True)


def _stretch(kind: str, size: int, resample: int, statistics: Mapping[str, Any]) -> dict[str, Any]:
    square = {"height": size, "width": size}
    return dict(image_processor_type=f"{kind}ImageProcessor", size=square, resample=resample, **_COMMON, **statistics)


def _crop(kind: str, resized: Mapping[str, int], size: int, statistics: Mapping[str, Any]) -> dict[str, Any]:
    crop = dict(do_center_crop=True, crop_size={"height": size, "width": size})
    return dict(image_processor_type=f"{kind}ImageProcessor", size=resized, resample=3, **crop, **_COMMON, **statistics)


_LABELS = dict(enumerate(["ant", "bee", "crow", "duck", "emu"]))
_CLASSES = dict(id2label=_LABELS, label2id={name: i for i, name in _LABELS.items()})
_TINY = dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
_TINY_VIT = dict(**_TINY, intermediate_size=40)
_TINY_DECODER = dict(
    decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16
)  # fmt: skip
_TINY_TEXT = dict(
    hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
    max_position_embeddings=6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_PAIR = dict(vision_config=_TINY_VIT, text_config=_TINY_TEXT)
_UNMASKED = dict(mask_ratio=0.0)
_SWIGLU = dict(use_swiglu_ffn=True)
_GATED = dict(use_gated_mlp=True, hidden_act="silu")
_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
_SIZES = ((16, 16), (24, 24), (24, 12))

_vit = partial(_build, processor=_stretch("ViT", 16, 2, _HALF))
_deit = partial(_build, processor=_crop("DeiT", {"height": 18, "width": 18}, 16, _IMAGENET))
_mae = partial(_build, processor=_stretch("ViT", 16, 2, _IMAGENET), output=_unmasked_tokens)
_dino = partial(_build, processor=_crop("Bit", {"shortest_edge": 18}, 16, _IMAGENET), interpolate=False)
_dinov3 = partial(_build, processor=_stretch("DINOv3ViT", 16, 2, _IMAGENET), interpolate=False, output=_pooled)
_siglip = partial(_build, processor=_stretch("Siglip", 16, 3, _HALF))
_clip = partial(_build, processor=_crop("CLIP", {"shortest_edge": 16}, 16, _OPENAI))


def _tiny(family: str, cls: str, build: Callable[..., Reference], config: Mapping[str, Any], **more: Any) -> Case:
    """A tiny model of a class; `note` tells it from others of that class, `compared` is `Case.output`."""
    note, compared = more.pop("note", ""), more.pop("compared", "")
    build = partial(build, name=cls, config=config, own_size=_SIZES[0], **more)
    return Case(family, f"{cls} {note}".strip(), "transformers", build, _SIZES, output=compared)


def _published(
    family: str, name: str, cls: str, build: Callable[..., Reference], config: Mapping[str, Any], **more: Any
) -> Case:
    """The architecture of a published checkpoint, with random weights."""
    sizes, compared = more.pop("sizes"), more.pop("compared", "")
    build = partial(build, name=cls, config=config, own_size=sizes[0], **more)
    return Case(family, name, "transformers", build, sizes, output=compared, full_size=True)


_DINO, _REGISTERS = "hf:dinov2", "hf:dinov2_with_registers"
_IN_MEMORY = dict(in_memory=True, note="(names in memory)")
_WITH_GRADIENTS = dict(gradients=True, note="(gradients)")

CASES: list[Case] = [
    _tiny("hf:vit", "ViTForImageClassification", _vit, _TINY_VIT | _CLASSES),
    _tiny("hf:vit", "ViTForImageClassification", _vit, _TINY_VIT | _CLASSES, **_WITH_GRADIENTS),
    _tiny("hf:vit", "ViTModel", _vit, _TINY_VIT, output=_pooled, **_IN_MEMORY),
    _tiny("hf:deit", "DeiTForImageClassificationWithTeacher", _deit, _TINY_VIT | _CLASSES),
    _tiny("hf:deit", "DeiTForImageClassification", _deit, _TINY_VIT | _CLASSES, **_IN_MEMORY),
    _tiny("hf:vit_mae", "ViTMAEForPreTraining", _mae, _TINY_VIT | _TINY_DECODER | _UNMASKED, compared="encoded"),
    _tiny("hf:vit_mae", "ViTMAEModel", _mae, _TINY_VIT | _UNMASKED, compared="encoded", **_IN_MEMORY),
    _tiny(_DINO, "Dinov2ForImageClassification", _dino, _TINY | _CLASSES),
    _tiny(_DINO, "Dinov2Model", _dino, _TINY | _SWIGLU, output=_pooled, note="(SwiGLU)"),
    _tiny(_DINO, "Dinov2Model", _dino, _TINY | _SWIGLU, output=_pooled, **_IN_MEMORY),
    _tiny(_REGISTERS, "Dinov2WithRegistersForImageClassification", _dino, _TINY | _CLASSES),
    _tiny(_REGISTERS, "Dinov2WithRegistersModel", _dino, _TINY | _SWIGLU, output=_pooled, **_IN_MEMORY),
    _tiny(_REGISTERS, "Dinov2WithRegistersModel", _dino, _TINY | _SWIGLU, output=_pooled, **_WITH_GRADIENTS),
    _tiny("hf:dinov3_vit", "DINOv3ViTModel", _dinov3, _TINY_VIT | dict(num_register_tokens=4)),
    _tiny("hf:dinov3_vit", "DINOv3ViTModel", _dinov3, _TINY_VIT | _GATED, **_IN_MEMORY),
    _tiny("hf:siglip", "SiglipVisionModel", _siglip, _TINY_VIT, output=_pooled),
    _tiny("hf:siglip", "SiglipModel", _siglip, _PAIR, output=_features_of_pair),
    _tiny("hf:siglip", "SiglipForImageClassification", _siglip, _PAIR | _CLASSES),
    _tiny("hf:clip", "CLIPVisionModel", _clip, _TINY_VIT | dict(hidden_act="gelu"), output=_pooled, note="(gelu)"),
    _tiny("hf:clip", "CLIPVisionModelWithProjection", _clip, _TINY_VIT | dict(projection_dim=6), output=_projected),
    _tiny("hf:clip", "CLIPModel", _clip, _PAIR | dict(projection_dim=6), output=_features_of_pair),
    _published(
        "hf:vit",
        "vit-base-patch16-224",
        "ViTForImageClassification",
        _vit,
        dict(**_BASE, image_size=224, num_labels=1000),
        processor=_stretch("ViT", 224, 2, _HALF),
        sizes=((224, 224), (256, 192)),
    ),
    _published(
        "hf:deit",
        "deit-base-distilled-patch16-224",
        "DeiTForImageClassificationWithTeacher",
        _deit,
        dict(**_BASE, image_size=224, num_labels=1000),
        processor=_crop("DeiT", {"height": 256, "width": 256}, 224, _IMAGENET),
        sizes=((224, 224), (256, 192)),
    ),
    _published(
        "hf:vit_mae",
        "vit-mae-base",
        "ViTMAEForPreTraining",
        _mae,
        dict(**_BASE, image_size=224, **_UNMASKED),
        compared="encoded",
        processor=_stretch("ViT", 224, 3, _IMAGENET),
        sizes=((224, 224), (256, 192)),
    ),
    _published(
        _DINO,
        "dinov2-base",
        "Dinov2Model",
        _dino,
        dict(**_BASE, image_size=518, patch_size=14),
        output=_pooled,
        processor=_crop("Bit", {"shortest_edge": 256}, 224, _IMAGENET),
        sizes=((518, 518), (224, 224), (224, 168)),
    ),
    _published(
        _REGISTERS,
        "dinov2-with-registers-base",
        "Dinov2WithRegistersModel",
        _dino,
        dict(**_BASE, image_size=518, patch_size=14),
        output=_pooled,
        processor=_crop("Bit", {"shortest_edge": 256}, 224, _IMAGENET),
        sizes=((518, 518), (224, 224), (224, 168)),
    ),
    _published(
        "hf:dinov3_vit",
        "dinov3-vits16plus",
        "DINOv3ViTModel",
        _dinov3,
        dict(image_size=224, num_register_tokens=4, **_GATED),
        processor=_stretch("DINOv3ViT", 224, 2, _IMAGENET),
        sizes=((224, 224), (256, 192)),
    ),
    _published(
        "hf:siglip",
        "siglip-base-patch16-224",
        "SiglipVisionModel",
        _siglip,
        dict(**_BASE, image_size=224),
        output=_pooled,
        processor=_stretch("Siglip", 224, 3, _HALF),
        sizes=((224, 224), (256, 192)),
    ),
    _published(
        "hf:clip",
        "clip-vit-base-patch32",
        "CLIPVisionModelWithProjection",
        _clip,
        dict(**_BASE, image_size=224),
        output=_projected,
        processor=_crop("CLIP", {"shortest_edge": 224}, 224, _OPENAI),
        sizes=((224, 224), (256, 192)),
    ),
]
