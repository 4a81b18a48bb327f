"""`save_pretrained`: from our model and its parameters to files that another library opens."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from vit_flax.convert import engine
from vit_flax.convert.families import FAMILIES, GROUPS
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.resample import Grid
from vit_flax.convert.source import CONFIG, PREPROCESSOR, WEIGHTS, Source, Tensor
from vit_flax.convert.table import PROBABILITIES, Family, Outgoing
from vit_flax.models import ViT
from vit_flax.models.layout import stack_blocks
from vit_flax.models.patches import both_sides
from vit_flax.models.posemb import FIXED_TABLES

# Fields of `ViT` that say how to train or compute and not what the function is; only our own format carries them.
_NOT_ARCHITECTURE = {
    "drop_path", "drop_path_ramp", "dropout", "attention_dropout", "head_dropout", "head_bias_init", "head_zero_init",
    "scan", "scan_unroll", "remat", "attention_impl", "return_attention", "dtype", "param_dtype", "parent", "name",
}  # fmt: skip


_OF_THE_CODE = (
    "Activation and epsilon can be fixed by the code that reads a format (.npz: gelu_tanh and 1e-6; timm: by the "
    "architecture). To write the same weights for those, which is nearly the same function, change the fields first: "
    """model.clone(norm_eps=1e-6), or --fields '{"norm_eps": 1e-6}' on the command line.\n"""
)


def save_pretrained(
    directory: str | Path,
    model: ViT,
    params: Mapping[str, Any],
    *,
    family: str,
    class_names: Sequence[str] | np.ndarray | None = None,
    preprocess: Preprocess | None = None,
    image_size: int | Grid | None = None,
    posemb_resize: str = "bicubic_antialias",
    patch_resize: str = "bicubic_antialias",
    probabilities: str = "softmax",
) -> Path:
    """Writes a checkpoint that the family's own library opens, or explains why that library cannot express the model.

    What was written is read back as a description before anything reaches the disk, and compared with the model: so a
    field that the target cannot hold is an error and never a silent change. A format without fixed positions gets them
    as a learned table, one without a class token's position gets it in the token: the same function.

    Args:
      directory: to create; must not exist yet, or be empty. A name that ends in .npz is the file itself.
      model: with the fields that its parameters were trained for.
      params: of the model, scanned or looped.
      family: a key of `families.FAMILIES`, or of `families.GROUPS` ("hf", "timm", "npz", "vit_flax") for the first
        member that can express the model.
      class_names: one per logit, where the format has a place for them.
      preprocess: where the format has a place for it.
      image_size: in pixels, of the position table; None for that of `preprocess`, else that of a square table, or about
        224 for a model without a learned one.
      posemb_resize: how the position table is to be resampled later (kept by our own format only).
      patch_resize: the same for the patch embedding.
      probabilities: "sigmoid" where each class has its own, as of a model for several labels; "none" for numbers that
        are no classes (kept by our own format, and by transformers' where it has labels).

    Returns: the folder, or the .npz file.

    Raises:
      FileExistsError: there is something at `directory` already.
      ValueError: the target cannot express the model; every reason is listed. Or a parameter is not finite. Nothing was
        written.
    """
    directory = Path(directory).expanduser()
    names = check_target(directory, family)
    if probabilities not in PROBABILITIES:
        raise ValueError(f"{probabilities=} is unknown: expected one of {', '.join(PROBABILITIES)}.")
    kept = dict(posemb_resize=posemb_resize, patch_resize=patch_resize, probabilities=probabilities)
    out = _outgoing(model, params, class_names, preprocess, image_size, **kept)
    reasons: dict[str, list[str]] = {}
    for same in (out, *_with_learned_positions(out)):
        for kind in sorted((FAMILIES[n] for n in names), key=lambda kind: _moves_positions(kind, same.model)):
            tensors, files, reasons[kind.name] = _express(kind, same)
            if not reasons[kind.name]:
                return _write(directory, kind, tensors, files)
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
    parts = ["; ".join(why).split("; ") for why in reasons.values()]
    nearly = any(all(re.match(r"(activation|norm_eps)=", part) for part in why) for why in parts)
    fixed = _OF_THE_CODE if nearly else ""
    raise ValueError(f"The model cannot be written as {family!r}:\n{listed}\n{fixed}Nothing was written.")


def check_target(directory: Path, family: str) -> tuple[str, ...]:
    """The families that `family` stands for, where they can be written to a place.

    Raises: FileExistsError, ValueError: as of `save_pretrained`; the name is that of another kind of file.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty: choose another place, or remove it first.")
    names = GROUPS.get(family, (family,))
    if unknown := [n for n in names if n not in FAMILIES]:
        raise ValueError(f"Unknown family {unknown[0]!r}: expected one of {', '.join([*GROUPS, *FAMILIES])}.")
    to_file = FAMILIES[names[0]].suffix == ".npz"
    if directory.suffix in (".safetensors", *(() if to_file else (".npz",))):
        how = "a file: give a name that ends in .npz" if to_file else "a folder: give a name that is not that of a file"
        raise ValueError(f"{directory}: {family} is written as {how}.")
    return names


def _outgoing(
    model: ViT,
    params: Mapping[str, Any],
    class_names: Any,
    preprocess: Preprocess | None,
    image_size: int | Grid | None,
    **kept: str,
) -> Outgoing:
    flat = {p: np.asarray(w) for p, w in flatten_dict(stack_blocks(params), sep="/").items()}
    flat = {p: w.astype(np.float32) if w.dtype == ml_dtypes.bfloat16 else w for p, w in flat.items()}
    if "patch_embed/kernel" not in flat:
        raise ValueError(
            "The parameters are not those of a ViT: there is no patch_embed/kernel, only "
            f"{sorted(flat)[:5]}. Give the tree below 'params'."
        )
    if bad := [p for p, w in flat.items() if not np.isfinite(w).all()]:
        raise ValueError(
            f"These parameters have numbers that are not finite: {', '.join(bad[:10])}. Write an earlier checkpoint."
        )
    ph, pw = model.patch_shape
    channels = flat["patch_embed/kernel"].shape[0] // (ph * pw)
    size = preprocess.image_size if preprocess else None
    if image_size is not None:
        size = both_sides(image_size)
        if preprocess and preprocess.image_size != size:
            raise ValueError(f"image_size={size}, and preprocess has {preprocess.image_size}: leave one of them out.")
    if size and (size[0] % ph or size[1] % pw):
        raise ValueError(
            f"image_size={size}: patches of {(ph, pw)} pixels do not divide it, so that no picture of that size would "
            "fit the model. Choose a multiple."
        )
    if "posemb/table" in flat:
        patches = flat["posemb/table"].shape[1]
        rows, columns = (size[0] // ph, size[1] // pw) if size else (side := round(patches**0.5), patches // side)
        if rows * columns != patches:
            raise ValueError(
                f"The position table has {patches} patches, not {rows} x {columns}: give the image size that they come "
                "from, as `image_size` or in `preprocess`."
            )
        size = (rows * ph, columns * pw)
    size = size or (224 // ph * ph, 224 // pw * pw)
    if isinstance(class_names, str):
        raise ValueError(f"{class_names=}: expected a list of names, one per class.")
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for num_classes={model.num_classes}.")
    model = model.clone(scan=True)
    shapes = engine.parameter_shapes(model, size, channels)
    wrong = {p for p in {*shapes, *flat} if p not in shapes or p not in flat or shapes[p].shape != flat[p].shape}
    if wrong:
        raise ValueError(f"The parameters are not those of the model; they differ in {sorted(wrong)[:10]}.")
    names = tuple(map(str, class_names)) if class_names is not None else None
    return Outgoing(model, flat, channels, size, preprocess, names, **kept)


def _with_learned_positions(out: Outgoing) -> list[Outgoing]:
    """The same function of a model with fixed positions, with the table as a parameter; none of any other model."""
    if out.model.posemb not in FIXED_TABLES:
        return []
    (rows, columns), (ph, pw) = out.image_size, out.model.patch_shape
    table = FIXED_TABLES[out.model.posemb]((rows // ph, columns // pw), out.model.width)
    model = out.model.clone(posemb="learned", class_token_position=False)
    return [replace(out, model=model, params={**out.params, "posemb/table": table[None]})]


def _express(kind: Family, out: Outgoing) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]], list[str]]:
    """Tensors, files and the reasons why they would not be this model."""
    if kind.config is None:
        return {}, {}, ["this family is only read"]
    out = _place_positions(out, kind.wants_token_positions(out.model))
    try:
        files = kind.config(out)
        tensors, left = engine.write(out.params, kind.rows(out.model))
        tensors |= kind.extra(out)
        stored = {n: Tensor(n, w.shape, w.dtype, lambda w=w: w) for n, w in tensors.items()}
        source = Source(kind.name, kind.spell(stored), files.get(CONFIG, {}), files.get(PREPROCESSOR, {}))
        if not kind.matches(source):
            return {}, {}, ["it would not be recognised as one"]
        spec = kind.describe(source)
        back = ViT(**spec.fields)
    except ValueError as error:
        return {}, {}, [str(error).removeprefix(f"{kind.name}: ")]
    ours, theirs = architecture(out.model), architecture(back)
    reasons = [f"{f}={ours[f]!r} would come back as {theirs[f]!r}" for f in ours if ours[f] != theirs[f]]
    for path in sorted(left):
        if path not in spec.constants:
            reasons.append(f"it has no place for {path}")
        elif np.any(out.params[path] != spec.constants[path]):
            reasons.append(f"it cannot hold {path}, which would have to be {spec.constants[path]:g} everywhere")
    return tensors, files, reasons


def architecture(model: ViT) -> dict[str, Any]:
    """The fields that say which function a model computes, with every default resolved."""
    values = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in _NOT_ARCHITECTURE}
    values["class_token"] = model.has_class_token
    values["class_token_position"] = (
        model.class_token_position and model.posemb == "learned" and (model.has_class_token or model.dist_token)
    )
    # The norm of every token, and then one of them, is the norm of that one.
    values["norm_after_pool"] = model.norm_after_pool and model.pool not in ("tok", "tok_dist")
    values["head_dim"] = model.head_dim or model.width // model.num_heads
    values["layer_scale"] = model.layer_scale is not None  # the initial value does not outlive training
    values["patch_size"] = model.patch_shape
    return values


def _moves_positions(kind: Family, model: ViT) -> bool:
    return kind.wants_token_positions(model) not in (None, architecture(model)["class_token_position"])


def _place_positions(out: Outgoing, wanted: bool | None) -> Outgoing:
    """Adds the class token's position to the token for a family without a slot for it; zeros the other way round."""
    model, params = out.model, dict(out.params)
    tokens = [t for t in ("cls_token", "dist_token") if f"{t}/token" in params]
    if wanted is None or model.posemb != "learned" or not tokens or model.class_token_position == wanted:
        return out
    for token in tokens:
        if wanted:
            params[f"{token}/position"] = np.zeros_like(params[f"{token}/token"])
        else:
            params[f"{token}/token"] = params[f"{token}/token"] + params.pop(f"{token}/position")
    return replace(out, model=model.clone(class_token_position=wanted), params=params)


def _safetensors_writer() -> Any:
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Writing this format needs the package safetensors: pip install safetensors."
        ) from error
    return save_file


def _write(directory: Path, kind: Family, tensors: Mapping[str, np.ndarray], files: Mapping[str, Any]) -> Path:
    """Into a temporary neighbour first, so that a full disk leaves nothing half-written under the final name."""
    target = directory / "model.npz" if kind.suffix == ".npz" and directory.suffix != ".npz" else directory
    folder = target.parent if target.suffix == ".npz" else directory.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".vit_flax_") as scratch:
        made = Path(scratch) / "made"
        if kind.suffix == ".npz":
            with open(made, "wb") as file:
                np.savez(file, **tensors)  # type: ignore[arg-type]
        else:
            made.mkdir()
            save_file = _safetensors_writer()
            save_file(dict(tensors), made / WEIGHTS, metadata={"format": "pt"})
            for name, content in files.items():
                (made / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            # safetensors lets nobody else read its file; who may is for the umask to say, as with the others.
            (made / WEIGHTS).chmod((made / CONFIG).stat().st_mode)
        os.replace(made, target)
    return target
