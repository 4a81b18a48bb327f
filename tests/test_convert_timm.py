"""timm's checkpoints against the outputs of timm 1.0.31, and folders for timm against those that it has opened.

How the golden files were made: `golden/make_timm.py`.
"""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden_cases import GOLDEN, TOLERANCE, assert_same_tensors, expected, folders, output, tensors
from vit_flax.convert import Preprocess, load_pretrained, save_pretrained
from vit_flax.convert.families.timm_architectures import facts_of
from vit_flax.models import ViT

NAMES = folders("timm_")
PLAIN = GOLDEN / "timm_vit_base_patch16_224"


def test_golden_files_are_there():
    assert len(NAMES) == 31


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_timm_at_every_image_size(name):
    for i, (size, (image, theirs)) in enumerate(expected(name).items()):
        pretrained = load_pretrained(GOLDEN / name, image_size=size if i else None)
        assert pretrained.report.family == "timm"
        assert not pretrained.report.reinitialised
        assert not pretrained.report.unused
        np.testing.assert_allclose(output(pretrained, image), theirs, atol=TOLERANCE, rtol=0)
        has_table = "posemb" in pretrained.params
        assert list(pretrained.report.resampled) == (["posemb/table"] if i and has_table else [])


@pytest.mark.parametrize("name", NAMES)
def test_written_folder_is_the_one_that_timm_has_opened(name, tmp_path):
    loaded = load_pretrained(GOLDEN / name)
    written = save_pretrained(
        tmp_path / "out", loaded.model, loaded.params, family="timm", preprocess=loaded.preprocess
    )
    assert json.loads((written / "config.json").read_text()) == json.loads((GOLDEN / name / "written.json").read_text())
    assert_same_tensors(tensors(written), tensors(GOLDEN / name))


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("channels:1", dict(channels=1)),
        ("channels:4", dict(channels=4)),
        ("patch:6", dict(patch_size=6, image_size=(24, 36))),
        ("patch:2", dict(patch_size=2, image_size=(12, 8))),
    ],
)
def test_other_channels_and_patches_are_those_of_timm(key, arguments):
    theirs = np.load(GOLDEN / "timm_adapted.npz")
    pretrained = load_pretrained(PLAIN, **arguments)
    ours = output(pretrained, theirs[f"image:{key}"])
    # timm inverts the resize of a patch in float32; on this kernel that is worth up to 1e-5 by itself.
    np.testing.assert_allclose(ours, theirs[f"output:{key}"], atol=2 * TOLERANCE if "patch" in key else TOLERANCE)
    assert "patch_embed/kernel" in pretrained.report.resampled


FACTS = json.loads((GOLDEN / "timm_architectures.json").read_text())


@pytest.mark.parametrize("architecture", FACTS)
def test_facts_of_an_architecture_are_those_of_the_built_model(architecture):
    if FACTS[architecture] is None:
        with pytest.raises(ValueError, match=f"timm's {architecture} is not"):
            facts_of(architecture)
    else:
        theirs = dict(FACTS[architecture])
        ours = {"activation": "silu" if theirs.pop("gated") else "gelu"} | facts_of(architecture)
        assert {name: ours[name] for name, value in theirs.items()} == theirs


def test_most_architectures_are_read():
    assert sum(facts is not None for facts in FACTS.values()) == 169
    assert len(FACTS) == 244


def copy_of(name, folder, change=lambda config: None, weights=lambda tensors: None):
    """A golden folder with another config.json or other tensors."""
    folder.mkdir()
    config, stored = json.loads((GOLDEN / name / "config.json").read_text()), tensors(GOLDEN / name)
    stored = {key: np.array(tensor) for key, tensor in stored.items()}
    change(config)
    weights(stored)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors")
    return folder


def test_bare_file_needs_the_name_of_its_architecture(tmp_path):
    bare = tmp_path / "model.safetensors"
    shutil.copy(GOLDEN / "timm_vit_base_patch16_dinov3" / "model.safetensors", bare)
    with pytest.raises(ValueError, match=r"does not say which architecture.*family='timm:vit_base_patch16_224'"):
        load_pretrained(bare)
    with pytest.raises(
        ValueError, match=r"shapes or types disagree(.|\n)*cls_token: float32 \[1, 1, 24\].*\[1, 1, 768\]"
    ):
        load_pretrained(bare, family="timm:vit_base_patch16_dinov3")
    pretrained = load_pretrained(
        bare, family="timm:vit_base_patch16_dinov3", fields=dict(width=24, num_heads=2), image_size=(16, 24)
    )
    assert pretrained.preprocess is None
    image, theirs = expected("timm_vit_base_patch16_dinov3")[16, 24]
    np.testing.assert_allclose(output(pretrained, image), theirs, atol=TOLERANCE)


def test_bare_file_of_a_rectangular_table_is_an_error(tmp_path):
    folder = copy_of("timm_vit_base_patch16_224", tmp_path / "bare", lambda config: config.clear())
    with pytest.raises(ValueError, match=r"'pos_embed' has 25 positions, 1 of them .* a square grid"):
        load_pretrained(folder, family="timm:vit_base_patch16_224")


def test_bare_file_that_could_be_two_things_is_an_error(tmp_path):
    folder = copy_of("timm_vit_base_patch16_224", tmp_path / "bare", lambda config: config.clear())
    with pytest.raises(ValueError, match="could be any of timm, meta:mae: say which with family="):
        load_pretrained(folder)


def test_wrong_family_is_an_error():
    with pytest.raises(ValueError, match=r"does not look like family='google'.*It looks like timm\."):
        load_pretrained(PLAIN, family="google")
    with pytest.raises(ValueError, match=r"does not look like family='timm'.*It looks like big_vision\."):
        load_pretrained(GOLDEN / "big_vision_tok.ckpt.npz", family="timm")
    with pytest.raises(ValueError, match="Unknown family 'tim:vit_base_patch16_224'"):
        load_pretrained(PLAIN, family="tim:vit_base_patch16_224")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(num_classes=9, model_args=dict(num_classes=9)),
            r"head.weight: float32 \[5, 24\] in the file, and head/kernel needs \[24, 9\]",
        ),
        (dict(model_args=dict(embed_dim=48)), r"cls_token: float32 \[1, 1, 24\] in the file.*needs \[1, 1, 48\]"),
        (dict(model_args=dict(depth=3)), r"the file has 2 blocks \(blocks\.0 to 1\..* and the model 3\."),
        (dict(model_args=dict(depth=1)), r"the file has 2 blocks \(blocks\.0 to 1\..* and the model 1\."),
        (dict(model_args=dict(reg_tokens=2)), r"in the model only: registers/tokens \[1, 2, 24\]"),
        (dict(model_args=dict(in_chans=4)), r"patch_embed\.proj\.weight: float32 \[24, 3, 4, 4\]"),
        (dict(model_args=dict(scale_attn_norm=True)), "model_args.scale_attn_norm=True, which has no counterpart"),
        (dict(model_args=dict(norm_layer="rmsnorm")), "model_args.norm_layer='rmsnorm', which has no counterpart"),
        (dict(model_args=dict(global_pool="avgmax")), "model_args.global_pool='avgmax', which has no counterpart"),
        (dict(architecture="vit_base_patch16_xp_224"), "vit_base_patch16_xp_224 is not supported: its blocks run"),
        (dict(architecture="vit_base_patch16_foo_224"), "vit_base_patch16_foo_224 is not known here .its part 'foo'"),
        (dict(architecture="resnet50"), "timm's resnet50 is not known here"),
        (dict(label_names=["a", "b"]), "config.json has 2 label_names for num_classes=5"),
    ],
)
def test_configuration_of_other_weights_is_an_error(change, message, tmp_path):
    def update(config):
        for key, value in change.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value

    folder = copy_of("timm_vit_base_patch16_224", tmp_path / "changed", update)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_attention_pooling_over_registers_is_an_error(tmp_path):
    folder = copy_of(
        "timm_vit_base_patch16_dinov3", tmp_path / "changed", lambda c: c["model_args"].update(global_pool="map")
    )
    with pytest.raises(ValueError, match=r"attention pooling of timm's eva\.py attends to the tokens in front"):
        load_pretrained(folder)


def test_rotations_of_another_kind_are_an_error(tmp_path):
    folder = copy_of(
        "timm_vit_base_patch16_dinov3", tmp_path / "changed", lambda c: c["model_args"].update(rope_temperature=50.0)
    )
    with pytest.raises(ValueError, match=r"rotations of a kind that we do not have.*'rope_temperature': 50.0"):
        load_pretrained(folder)


def test_damaged_weights_are_an_error(tmp_path):
    def spoil(stored):
        stored["blocks.1.mlp.fc2.weight"][3, 4] = np.nan

    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.fc2\.weight' holds 1 values that are NaN"):
        load_pretrained(copy_of("timm_vit_base_patch16_224", tmp_path / "nan", weights=spoil))
    folder = copy_of("timm_vit_base_patch16_224", tmp_path / "short")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        load_pretrained(folder)


def test_class_names_and_preprocessing_come_from_the_configuration(tmp_path):
    def older(config):  # one level, as timm wrote it in 2022, the arguments aside
        card = config.pop("pretrained_cfg")
        config.update(card, label_names={"1": "b", "0": "a", "2": "c", "3": "d", "4": "e"}, crop_pct=0.9)

    for name, change in (("new", lambda c: c.update(label_names=list("abcde"))), ("old", older)):
        pretrained = load_pretrained(copy_of("timm_vit_base_patch16_224", tmp_path / name, change))
        assert pretrained.class_names == tuple("abcde")
        assert pretrained.preprocess == Preprocess((16, 24), crop_fraction=16 / 17, filter="bicubic")
    pretrained = load_pretrained(tmp_path / "new", num_classes=3)
    assert pretrained.class_names is None
    assert pretrained.params["head"]["kernel"].shape == (24, 3)


@pytest.mark.parametrize("card", [key for key in np.load(GOLDEN / "timm_preprocess.npz") if key != "picture"])
def test_preprocessing_is_that_of_timm(card, tmp_path):
    golden = np.load(GOLDEN / "timm_preprocess.npz")

    def change(config):
        config["pretrained_cfg"].update(json.loads(card), input_size=[3, 40, 40])
        config["model_args"]["img_size"] = None

    folder = copy_of("timm_vit_base_patch16_dinov3", tmp_path / "in", change)
    pretrained = load_pretrained(folder)
    assert pretrained.preprocess is not None
    ours = pretrained.preprocess(golden["picture"])
    levels = 255 * 0.229 * np.abs(ours - golden[card])
    assert levels.max() < 6  # Pillow rounds to whole levels between its two passes
    assert levels.mean() < 0.4
    written = save_pretrained(
        tmp_path / "out", pretrained.model, pretrained.params, family="timm", preprocess=pretrained.preprocess
    )
    config = json.loads((written / "config.json").read_text())
    theirs, ours = json.loads(card), config["pretrained_cfg"]
    assert 40 // ours.pop("crop_pct") == 40 // theirs.pop("crop_pct")
    assert {key: ours[key] for key in theirs} == theirs
    assert load_pretrained(written).preprocess == pretrained.preprocess


def small(**fields):
    """A model of ours and parameters for it."""
    model = ViT(**{**dict(num_classes=3, patch_size=4, width=24, depth=1, mlp_dim=48, num_heads=3), **fields})
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False)["params"], image)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(norm_eps=1e-12), r"norm_eps=1e-12, and timm has 1e-06 or 1e-05[\s\S]*model.clone\(norm_eps=1e-6\)"),
        (dict(pool="tok_gap"), "timm has no pooling 'tok_gap'"),
        (dict(representation_size=16), "representation_size=16 would come back as None"),
        (dict(head_dim=16), "heads are as wide as the model together"),
        (dict(qkv_bias="q"), "timm has no such biases, qkv_bias='q'"),
        (dict(patch_bias=False), "has a bias exactly where no norm follows it"),
        (dict(rope="dinov3", posemb="none", activation="gelu_tanh"), "timm's activation would be 'gelu'"),
        (dict(rope="dinov3_bf16", posemb="none"), "timm has no rotations 'dinov3_bf16'"),
        (dict(rope="eva", registers=1, pool="map"), "attends to the tokens in front of the patches too"),
        (
            dict(pool="tok_dist", dist_token=True, qkv_bias="qv"),
            "neither registers, rotations, gated layers nor biases",
        ),
        (dict(pool="tok_dist", dist_token=True, num_classes=None), "timm's models with a distillation token average"),
        (dict(mlp="swiglu", activation="silu", pool="map"), "attention pooling has an MLP of its own kind"),
        (
            dict(pool="tok_dist", dist_token=True, mlp="swiglu", activation="silu"),
            "neither registers, rotations, gated layers",
        ),
        (dict(pool="gap", dist_token=True), "timm's models with a distillation token average two heads"),
    ],
)
def test_model_that_timm_has_not_is_refused_with_the_reason(fields, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot be written as 'timm'(.|\n)*{reason}(.|\n)*Nothing was written"):
        save_pretrained(tmp_path / "out", *small(**fields), family="timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        dict(registers=2),
        dict(pool="tok_dist", dist_token=True, class_token_position=False),
        dict(registers=1, rope="eva"),
    ],
)
def test_positions_of_tokens_move_where_timm_has_them(fields, tmp_path):
    model, params = small(**fields)
    written = save_pretrained(tmp_path / "out", model, params, family="timm")
    again = load_pretrained(written)
    image = np.random.default_rng(1).standard_normal((1, 8, 8, 3), np.float32)
    before = output(replace(again, model=model, params=params), image)
    np.testing.assert_allclose(output(again, image), before, atol=TOLERANCE)
    assert again.model.class_token_position != model.class_token_position


def test_class_names_are_written(tmp_path):
    written = save_pretrained(tmp_path / "out", *small(), family="timm", class_names=["a", "b", "c"])
    assert load_pretrained(written).class_names == ("a", "b", "c")
