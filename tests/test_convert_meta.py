"""Meta's original files. Their code cannot be installed: the golden files are timm's models, renamed.

How they were made, and where the reference departs from timm: `vit_flax/convert/parity/meta.py`.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden_cases import GOLDEN, TOLERANCE, expected, folders, output, tensors
from vit_flax.convert import Preprocess, load_pretrained, resample, save_pretrained
from vit_flax.convert.preprocess import IMAGENET
from vit_flax.models.posemb import rope_dinov3

FAMILIES = {  # golden folder: family, posemb_resize, parts of the file that are no part of the model
    "meta_dinov2": ("meta:dinov2", "bicubic_offset", {"mask_token"}),
    "meta_dinov2_with_registers": ("meta:dinov2", "bicubic_antialias", {"mask_token"}),
    "meta_dinov2_giant": ("meta:dinov2", "bicubic_offset", {"mask_token"}),
    "meta_dinov3": ("meta:dinov3", None, {"mask_token", "rope_embed.periods", "local_cls_norm.weight"}),
    "meta_dinov3_gated": ("meta:dinov3", None, {"mask_token", "rope_embed.periods", "local_cls_norm.weight"}),
    "meta_dinov3_gated_no_biases": ("meta:dinov3", None, {"mask_token", "rope_embed.periods", "local_cls_norm.weight"}),
    "meta_mae_with_its_decoder": (
        "meta:mae", "bicubic", {"mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"},
    ),
    "meta_mae_fine_tuned": ("meta:mae", "bicubic", set()),
    "meta_deit_iii": ("meta:deit3", "bicubic", set()),
}  # fmt: skip
NAMED = {"meta_mae_fine_tuned": "meta:mae"}  # its tensors could be those of a bare timm file


def load(name, **arguments):
    return load_pretrained(GOLDEN / name, family=NAMED.get(name), **arguments)


def test_golden_files_are_there():
    assert folders("meta_") == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_the_reference_at_every_image_size(name):
    family, posemb_resize, unused = FAMILIES[name]
    for i, (size, (image, theirs)) in enumerate(expected(name).items()):
        pretrained = load(name, image_size=size)
        report = pretrained.report
        assert report.family == family
        assert set(report.unused) == unused
        assert not report.reinitialised
        if posemb_resize:
            assert report.posemb_resize == posemb_resize
            assert list(report.resampled) == (["posemb/table"] if i else [])
        np.testing.assert_allclose(output(pretrained, image), theirs, atol=TOLERANCE, rtol=0)


def test_fine_tuned_mae_without_a_name_is_ambiguous():
    with pytest.raises(ValueError, match="could be any of timm, meta:mae"):
        load_pretrained(GOLDEN / "meta_mae_fine_tuned")


@pytest.mark.parametrize("new", [(16, 16), (23, 9), (74, 37)])
def test_dinov2_resizes_its_table_by_the_scale_that_its_code_computes(new):
    """The scale is (new + 0.1) / old per axis, and torch maps output i to (i + 0.5) / scale - 0.5, taps clamped."""
    old, table = (37, 37), np.random.default_rng(0).standard_normal((1, 37 * 37, 2))
    wanted = table.reshape(37, 37, 2)
    for axis in (0, 1):
        centres = (np.arange(new[axis]) + 0.5) / ((new[axis] + 0.1) / old[axis]) - 0.5
        first = np.floor(centres).astype(int) - 1
        taps = first[:, None] + np.arange(4)
        x = np.abs(taps - centres[:, None])
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)  # Keys, a = -3/4
        weights = np.where(x <= 1, near, far)
        gathered = np.take(wanted, np.clip(taps, 0, 36), axis=axis)
        wanted = np.einsum("at,atjd->ajd" if axis == 0 else "bt,ibtd->ibd", weights, gathered)
    ours = resample.resample_posemb(table, old, new, "bicubic_offset")
    np.testing.assert_allclose(ours.reshape(*new, 2), wanted, atol=1e-12)


def changed(name, folder, change):
    """A golden folder with other tensors."""
    folder.mkdir()
    stored = {key: np.array(tensor) for key, tensor in tensors(GOLDEN / name).items()}
    change(stored)
    save_file(stored, folder / "model.safetensors")
    shutil.copy(GOLDEN / name / "config.json", folder)
    return folder


def test_biases_of_the_keys_are_masked():
    stored = tensors(GOLDEN / "meta_dinov3")
    bias, mask = stored["blocks.1.attn.qkv.bias"], stored["blocks.1.attn.qkv.bias_mask"]
    assert np.all(bias[24:48] != 0)
    assert np.all(mask[24:48] == 0)
    attention = load("meta_dinov3").params["blocks"]["attention"]
    assert "bias" not in attention["key"]
    np.testing.assert_array_equal(attention["value"]["bias"][1].ravel(), bias[48:])


def test_mask_that_leaves_a_bias_to_the_keys_is_an_error(tmp_path):
    def change(stored):
        stored["blocks.0.attn.qkv.bias_mask"][:] = 1

    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.qkv\.bias' cannot be read .its mask leaves a bias"):
        load_pretrained(changed("meta_dinov3", tmp_path / "changed", change))


def test_mask_is_multiplied_into_the_bias(tmp_path):
    def change(stored):
        stored["blocks.0.attn.qkv.bias_mask"][48:] = 0.5

    halved = load_pretrained(changed("meta_dinov3", tmp_path / "changed", change)).params["blocks"]["attention"]
    whole = load("meta_dinov3").params["blocks"]["attention"]
    np.testing.assert_array_equal(halved["value"]["bias"][0], whole["value"]["bias"][0] / 2)
    np.testing.assert_array_equal(halved["query"]["bias"][0], whole["query"]["bias"][0])


def test_rotations_follow_the_stored_periods(tmp_path):
    assert load("meta_dinov3").model.rope == "dinov3_bf16"
    assert load("meta_dinov3_gated").model.rope == "dinov3"
    exact, rounded = rope_dinov3((4, 4), 64), rope_dinov3((4, 4), 64, period_dtype="bfloat16")
    assert 1e-4 < np.abs(exact.sin - rounded.sin).max() < 2e-2

    def change(stored):
        stored["rope_embed.periods"] = 2 * stored["rope_embed.periods"]

    with pytest.raises(ValueError, match=r"'rope_embed\.periods' holds .*and the periods of DINOv3 are"):
        load_pretrained(changed("meta_dinov3", tmp_path / "changed", change))


def test_number_of_heads_comes_from_the_width_or_from_beside_the_file(tmp_path):
    shutil.copy(GOLDEN / "meta_dinov2" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"how many heads a model of width 24 has.*384, 768, 1024, 1536.*num_heads"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4}))
    assert load_pretrained(tmp_path).model.num_heads == 4


def test_published_widths_have_the_published_heads(tmp_path):
    def widen(stored):
        for key in stored:
            stored[key] = np.zeros(
                [384 if side == 24 else 3 * 384 if side == 72 else side for side in stored[key].shape]
            )

    folder = changed("meta_dinov2", tmp_path / "wide", widen)
    (folder / "config.json").unlink()
    pretrained = load_pretrained(folder)
    assert (pretrained.model.width, pretrained.model.num_heads) == (384, 6)
    cropped = Preprocess((16, 16), *IMAGENET, crop_fraction=0.875, filter="bicubic")
    assert pretrained.preprocess == cropped


def test_families_that_are_only_read_are_not_written(tmp_path):
    pretrained = load("meta_dinov2")
    with pytest.raises(ValueError, match="meta:dinov2: this family is only read"):
        save_pretrained(tmp_path / "out", pretrained.model, pretrained.params, family="meta:dinov2")


@pytest.mark.parametrize(
    "name", ["meta_dinov2_with_registers", "meta_dinov2_giant", "meta_mae_fine_tuned", "meta_deit_iii"]
)
def test_what_was_read_is_written_for_timm(name, tmp_path):
    pretrained = load(name)
    written = save_pretrained(tmp_path / "out", pretrained.model, pretrained.params, family="timm")
    again = load_pretrained(written)
    (_, (image, theirs)), *_ = expected(name).items()
    np.testing.assert_allclose(output(again, image), theirs, atol=TOLERANCE, rtol=0)
