"""Checkpoints of transformers: read, written, refused; proven without transformers (`golden/make_hf.py` used 5.24)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vit_flax.convert import Preprocess, load_pretrained, save_pretrained
from vit_flax.convert.families import FAMILIES
from vit_flax.convert.families.huggingface import read_config, read_preprocess, write_preprocess
from vit_flax.convert.families.huggingface_clip import _CLIP, _SIGLIP
from vit_flax.convert.source import Source, open_source
from vit_flax.models import ViT

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of float32 logits of size 1
NAMES = sorted(path.name for path in GOLDEN.glob("hf_*") if path.is_dir())
RESIZED = [  # one of each family
    "hf_ViTForImageClassification",
    "hf_DeiTForImageClassificationWithTeacher",
    "hf_ViTMAEForPreTraining",
    "hf_Dinov2ForImageClassification",
    "hf_Dinov2WithRegistersForImageClassification",
    "hf_DINOv3ViTModel",
    "hf_SiglipVisionModel",
    "hf_CLIPVisionModelWithProjection",
]
VIT, SIGLIP, CLIP = "hf_ViTForImageClassification", "hf_SiglipVisionModel", "hf_CLIPVisionModelWithProjection"


@pytest.fixture(scope="module")
def io():
    return {name: dict(np.load(GOLDEN / f"{name}.io.npz")) for name in NAMES}


def run(pretrained, image, output=""):
    apply = jax.jit(lambda params, image: pretrained.model.apply({"params": params}, image, train=False))
    with jax.default_matmul_precision("highest"):
        logits, out = apply(pretrained.params, jnp.asarray(image))
    return np.asarray(out[output] if output else logits)


def copy_of(name, folder, **config):
    """A golden checkpoint in another folder, with some keys of its config.json changed (None removes the file)."""
    shutil.copytree(GOLDEN / name, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def rewrite(folder, change):
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")
    return folder


def save(pretrained, path, family):
    return save_pretrained(
        path,
        pretrained.model,
        pretrained.params,
        family=family,
        class_names=pretrained.class_names,
        preprocess=pretrained.preprocess,
        probabilities=pretrained.probabilities,
    )


# In


@pytest.mark.parametrize("name", NAMES)
def test_output_is_that_of_the_library(name, io):
    pretrained = load_pretrained(GOLDEN / name)
    assert pretrained.report.family == io[name]["family"]
    # The projection of CLIP has no bias; it is the one thing that a file of these lacks.
    assert set(pretrained.report.reinitialised) <= {"head/bias"}
    output = run(pretrained, io[name]["image:16x16"], str(io[name]["output"]))
    np.testing.assert_allclose(output, io[name]["expected:16x16"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "size"), [*[(name, (24, 12)) for name in RESIZED], (RESIZED[0], (24, 24))])
def test_output_at_another_size_is_that_of_the_library(name, size, io):
    """The rectangle has more rows and fewer columns than the stored table, so that antialiasing shows."""
    pretrained = load_pretrained(GOLDEN / name, image_size=size)
    has_table = "posemb" in pretrained.params
    assert bool(pretrained.report.resampled) == has_table
    key = f"{size[0]}x{size[1]}"
    output = run(pretrained, io[name][f"image:{key}"], str(io[name]["output"]))
    np.testing.assert_allclose(output, io[name][f"expected:{key}"], atol=TOLERANCE, rtol=0)
    assert pretrained.preprocess.image_size == size


def test_every_family_has_a_golden_of_both_spellings(io):
    families = {name: str(io[name]["family"]) for name in NAMES}
    assert set(families.values()) == {name for name in FAMILIES if name.startswith("hf:")}
    renamed = {family for name, family in families.items() if name.endswith("in_memory")}
    assert renamed == set(families.values()) - {"hf:siglip", "hf:clip"}  # whose names are the same


def test_labels_and_preprocessing_come_along():
    pretrained = load_pretrained(GOLDEN / "hf_DeiTForImageClassificationWithTeacher")
    assert pretrained.class_names == ("ant", "bee", "crow", "duck", "emu")
    assert pretrained.preprocess == Preprocess(
        (16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16 / 18, keep_aspect=False, filter="bicubic"
    )
    assert load_pretrained(GOLDEN / SIGLIP).class_names is None


def test_numbered_labels_are_no_names(tmp_path):
    path = copy_of(VIT, tmp_path / "a", id2label={str(i): f"LABEL_{i}" for i in range(5)})
    assert load_pretrained(path).class_names is None


@pytest.mark.parametrize("name", [VIT, "hf_Dinov2ForImageClassification", "hf_SiglipForImageClassification"])
@pytest.mark.parametrize(
    ("said", "meant"), [("multi_label_classification", "sigmoid"), ("regression", "none"), (None, "softmax")]
)
def test_classifiers_of_several_labels(name, said, meant, tmp_path):
    pretrained = load_pretrained(copy_of(name, tmp_path / "a", problem_type=said))
    assert pretrained.probabilities == meant
    path = save(pretrained, tmp_path / "out", "hf")
    assert json.loads((path / "config.json").read_text()).get("problem_type") == said
    assert load_pretrained(path).probabilities == meant


def test_shards_are_one_checkpoint(tmp_path):
    path = copy_of(VIT, tmp_path / "a")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: w for n, w in tensors.items() if files[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    whole, sharded = load_pretrained(GOLDEN / VIT), load_pretrained(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, sharded.params))


def test_text_tower_beside_the_image_tower_is_reported_and_left_out():
    report = load_pretrained(GOLDEN / "hf_CLIPModel").report
    assert {"text_model.embeddings.token_embedding.weight", "logit_scale", "text_projection.weight"} <= set(
        report.unused
    )


def test_prefix_of_the_vision_tower_may_be_there_or_not(tmp_path, io):
    name = "hf_CLIPVisionModel_gelu"
    assert not any(key.startswith("vision_model.") for key in load_file(GOLDEN / name / "model.safetensors"))
    path = rewrite(copy_of(name, tmp_path / "a"), lambda t: {f"vision_model.{k}": w for k, w in t.items()})
    first, second = load_pretrained(GOLDEN / name), load_pretrained(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))


def test_defaults_of_the_class_fill_what_config_json_leaves_out():
    siglip = read_config(Source("x", {}, {"vision_config": {"model_type": "siglip_vision_model"}}), _SIGLIP)
    assert (siglip["hidden_size"], siglip["layer_norm_eps"], siglip["hidden_act"]) == (768, 1e-6, "gelu_pytorch_tanh")
    # The first CLIP files have a second dictionary, which the library lets win with its defaults.
    config = {"vision_config": {"hidden_size": 64, "patch_size": 8}, "vision_config_dict": {"hidden_size": 1024}}
    clip = read_config(Source("x", {}, config), _CLIP)
    assert (clip["hidden_size"], clip["patch_size"], clip["hidden_act"]) == (1024, 32, "quick_gelu")


def test_activation_and_epsilon_are_those_of_config_json(tmp_path):
    path = copy_of(CLIP, tmp_path / "a", hidden_act="gelu", layer_norm_eps=1e-3)
    model = load_pretrained(path).model
    assert (model.activation, model.norm_eps) == ("gelu", 1e-3)
    assert load_pretrained(GOLDEN / CLIP).model.activation == "quick_gelu"


def test_siglip_without_a_head_is_the_mean_over_patches(tmp_path):
    path = copy_of(SIGLIP, tmp_path / "a", vision_use_head=False)
    pretrained = load_pretrained(path)
    assert pretrained.model.pool == "gap"
    assert "head.probe" in pretrained.report.unused


def test_dinov3_without_biases_has_zeros(tmp_path):
    name = "hf_DINOv3ViTModel"
    path = copy_of(name, tmp_path / "a", proj_bias=False, mlp_bias=False, key_bias=False, query_bias=False)
    gone = ("o_proj.bias", "up_proj.bias", "down_proj.bias", "q_proj.bias")
    rewrite(path, lambda t: {k: w for k, w in t.items() if not k.endswith(gone)})
    pretrained = load_pretrained(path)
    assert pretrained.model.qkv_bias == "v"
    assert not np.any(pretrained.params["blocks"]["attention"]["out"]["bias"])
    assert not np.any(pretrained.params["blocks"]["mlp"]["fc1"]["bias"])


# Preprocessing

PICTURES = dict(np.load(GOLDEN / "hf_preprocess.npz"))
KINDS = [key.split(":")[1] for key in PICTURES if key.startswith("config:")]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_prepared_as_by_the_image_processor(kind):
    preprocess = read_preprocess(Source("x", {}, {}, json.loads(str(PICTURES[f"config:{kind}"]))), 8)
    difference = (preprocess(PICTURES["picture"]) - PICTURES[f"pixels:{kind}"]) * np.array(preprocess.std) * 255
    # Pillow rounds to whole grey levels between the two axes as well.
    assert np.abs(difference).max() < 1.01
    assert np.abs(difference).mean() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_preprocessing_survives_the_way_out_and_back(kind):
    preprocess = read_preprocess(Source("x", {}, {}, json.loads(str(PICTURES[f"config:{kind}"]))), 8)
    assert read_preprocess(Source("x", {}, {}, write_preprocess(preprocess) or {}), 8) == preprocess


def test_image_processor_beside_a_tokenizer_counts(tmp_path):
    path = copy_of("hf_CLIPModel", tmp_path / "a")
    old = json.loads((path / "preprocessor_config.json").read_text())
    nested = {"processor_class": "CLIPProcessor", "image_processor": old | {"image_mean": [0.1, 0.2, 0.3]}}
    (path / "processor_config.json").write_text(json.dumps(nested))
    assert load_pretrained(path).preprocess.mean == (0.1, 0.2, 0.3)
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert load_pretrained(path).preprocess.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)


STATISTICS = dict(do_resize=True, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)


def test_old_image_processors_give_sizes_as_one_number():
    def read(**values):
        return read_preprocess(Source("x", {}, {}, STATISTICS | values), 16)

    squash = read(feature_extractor_type="ViTFeatureExtractor", size=224)
    assert squash == Preprocess((224, 224), filter="bicubic")
    clip = read(feature_extractor_type="CLIPFeatureExtractor", size=224, crop_size=224, do_center_crop=True)
    assert clip == Preprocess((224, 224), crop_fraction=1.0, filter="bicubic")
    deit = read(feature_extractor_type="DeiTFeatureExtractor", size=256, crop_size=224, do_center_crop=True)
    assert deit == Preprocess((224, 224), crop_fraction=0.875, keep_aspect=False, filter="bicubic")


def test_pixels_that_the_patches_do_not_reach_are_cut_off():
    values = STATISTICS | dict(size={"height": 384, "width": 384}, do_rescale=True, rescale_factor=1 / 127.5)
    preprocess = read_preprocess(Source("x", {}, {}, values), 14)
    assert preprocess.image_size == (378, 378)
    assert preprocess.resized(500, 300) == (384, 384)
    assert preprocess.mean == (0.25, 0.25, 0.25)  # of pixels in [0, 1] instead of [0, 2]


@pytest.mark.parametrize(("said", "mean"), [({}, 0.5), ({"do_normalize": True}, 0.5), ({"do_normalize": False}, 0.0)])
def test_pictures_are_normalised_unless_the_processor_says_no(said, mean):
    values = {k: v for k, v in STATISTICS.items() if k != "do_normalize"} | dict(size=224) | said
    preprocess = read_preprocess(Source("x", {}, {}, values), 16)
    assert (preprocess.mean, preprocess.std) == ((mean,) * 3, (mean or 1.0,) * 3)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(resample=1), "resample=1"),
        (dict(do_resize=False), "resizes nothing"),
        (dict(do_rescale=False), "do_rescale=false: it leaves open"),
        (dict(image_mean=None), "no image_mean and image_std"),
        (dict(size={"shortest_edge": 224}), "shortest_edge"),
        (dict(size=224, crop_size=256, do_center_crop=True), "pads"),
        (dict(size={"height": 200, "width": 100}, crop_size=96, do_center_crop=True), "crops"),
    ],
)
def test_unknown_preprocessing_is_an_error_with_a_remedy(change, what):
    source = Source("folder", {}, {}, STATISTICS | dict(size=224) | change)
    with pytest.raises(ValueError, match=rf"folder: preprocessor_config.json .*{what}.*Take the file away"):
        read_preprocess(source, 16)


# Out


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_the_library_opened(name, io, tmp_path):
    """Names, shapes and config.json are those that the library took without a complaint when the golden was made."""
    first = load_pretrained(GOLDEN / name)
    family = str(io[name]["family"])
    # The group finds the family, but for the masked autoencoder: hf:vit holds that too.
    path = save(first, tmp_path / "out", family if family == "hf:vit_mae" else "hf")
    verified = json.loads(str(io[name]["exported"]))
    written = load_file(path / "model.safetensors")
    assert {key: list(w.shape) for key, w in written.items()} == verified["shapes"]
    assert json.loads((path / "config.json").read_text()) == verified["config"]
    assert b'"__metadata__":{"format":"pt"}' in (path / "model.safetensors").read_bytes()[:400]

    # Bit for bit what was read, as parameters and as tensors of the file.
    second = load_pretrained(path)
    assert second.report.family == family
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))
    assert (second.model, second.class_names, second.preprocess) == (first.model, first.class_names, first.preprocess)
    spell = FAMILIES[family].spell
    before, after = (spell(open_source(p).tensors) for p in (GOLDEN / name, path))
    if not name.endswith("in_memory"):
        assert {t.key for key, t in before.items() if key not in after} <= set(first.report.unused)
    common = [key for key in after if key in before and not key.endswith("mask_token")]
    assert all(before[key].read().tobytes() == after[key].read().tobytes() for key in common)


def test_masked_autoencoder_goes_out_as_a_vit(tmp_path):
    path = save(load_pretrained(GOLDEN / "hf_ViTMAEForPreTraining"), tmp_path / "out", "hf")
    assert load_pretrained(path).report.family == "hf:vit"


@pytest.mark.parametrize(
    ("golden", "family", "activation", "epsilon"),
    [
        ("vit_jax_prelinen", "hf:vit", "gelu_pytorch_tanh", 1e-6),
        ("big_vision_tok", "hf:vit", "gelu_pytorch_tanh", 1e-6),
        ("big_vision_map_siglip", "hf:siglip", "gelu_pytorch_tanh", 1e-6),
        (CLIP, "hf:clip", "quick_gelu", 1e-5),
    ],
)
def test_models_of_other_families_keep_activation_and_epsilon(golden, family, activation, epsilon, tmp_path):
    path = GOLDEN / golden if (GOLDEN / golden).exists() else GOLDEN / f"{golden}.ckpt.npz"
    first = load_pretrained(path)
    second = load_pretrained(save(first, tmp_path / "out", "hf"))
    assert second.report.family == family
    assert (second.model.norm_eps, second.model.activation) == (first.model.norm_eps, first.model.activation)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_act"], config["layer_norm_eps"]) == (activation, epsilon)


def test_class_token_without_a_position_gets_a_slot_of_zeros(tmp_path):
    first = load_pretrained(GOLDEN / "big_vision_tok.ckpt.npz")
    assert not first.model.class_token_position
    save(first, tmp_path / "out", "hf")
    table = load_file(tmp_path / "out" / "model.safetensors")["vit.embeddings.position_embeddings"]
    assert not np.any(table[:, 0])
    assert np.array_equal(table[:, 1:], first.params["posemb"]["table"])


def test_model_without_a_head_is_a_classifier_of_no_labels(tmp_path):
    first = load_pretrained(GOLDEN / VIT, num_classes=0)
    second = load_pretrained(save(first, tmp_path / "out", "hf"))
    assert second.model.num_classes is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["id2label"]) == (["ViTForImageClassification"], {})


TINY = dict(num_classes=5, patch_size=4, width=8, depth=1, mlp_dim=32, num_heads=2)
SCALED = dict(layer_scale=1.0, num_classes=None)


@pytest.mark.parametrize(
    ("fields", "family", "reason"),
    [
        (dict(pool="gap"), "hf:vit", "pool='gap' would come back as 'tok'"),
        (dict(registers=2), "hf:vit", "registers=2 would come back as 0"),
        (dict(representation_size=8), "hf:vit", "representation_size=8 would come back as None"),
        (dict(pre_norm=True), "hf:vit", "it has no place for pre_norm/bias"),
        (dict(layer_scale=1.0), "hf:vit", "no place for blocks/layer_scale1/scale"),
        (dict(qkv_bias="qv"), "hf:vit", "qkv_bias='qv' would come back as ''"),
        (dict(dist_token=True), "hf:vit", "ViTModel has no distillation token"),
        (dict(), "hf:deit", "DeiTModel has a distillation token"),
        (
            dict(dist_token=True, pool="tok_dist", num_classes=None),
            "hf:deit",
            "pool='tok_dist' would come back as 'tok'",
        ),
        (dict(SCALED, registers=2), "hf:dinov2", "Dinov2Model has no registers"),
        (SCALED, "hf:dinov2_with_registers", "Dinov2WithRegistersModel has registers"),
        (dict(), "hf:vit_mae", "ViTMAEModel has no head: write it as hf:vit"),
        (dict(num_classes=None), "hf:dinov2", "layer_scale=False would come back as True"),
        (dict(SCALED, mlp_dim=30), "hf:dinov2", "mlp_dim a multiple of the width, and 30 is not"),
        (dict(SCALED, mlp="swiglu", mlp_dim=30), "hf:dinov2", "two thirds of a whole multiple"),
        (dict(SCALED, mlp="swiglu", mlp_dim=24), "hf:dinov2", "activation='gelu' would come back as 'silu'"),
        (dict(SCALED, posemb="none"), "hf:dinov3_vit", "rope=None would come back as 'dinov3'"),
        (dict(pool="gap", num_classes=None), "hf:siglip", "needs a classifier"),
        (dict(pool="map"), "hf:siglip", "pool='map' would come back as 'gap'"),
        (
            dict(pre_norm=True, patch_bias=False, norm_after_pool=True),
            "hf:clip",
            "it cannot hold head/bias, which would have to be 0 everywhere",
        ),
    ],
)
def test_models_that_the_library_cannot_express_are_refused(fields, family, reason, tmp_path):
    assert_refused(ViT(**(TINY | fields)), (16, 16), family, reason, tmp_path / "out")


@pytest.mark.parametrize("family", ["hf:siglip", "hf:clip", "hf:dinov2"])
def test_rectangles_are_refused_where_the_library_thinks_in_squares(family, tmp_path):
    assert_refused(ViT(**TINY), (32, 16), family, "takes square images and patches", tmp_path / "out")


def assert_refused(model, size, family, reason, path):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, 3)), train=False))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["params"])
    with pytest.raises(ValueError, match="Nothing was written") as error:
        save_pretrained(path, model, params, family=family, preprocess=Preprocess(size))
    assert reason in str(error.value)
    assert not path.exists()


def test_norm_before_or_after_taking_the_class_token_is_one_function(tmp_path):
    first = load_pretrained(GOLDEN / "hf_CLIPVisionModel_gelu")
    assert first.model.norm_after_pool
    save_pretrained(tmp_path / "out", first.model.clone(norm_after_pool=False), first.params, family="hf:clip")


def test_projections_have_no_names(tmp_path):
    first = load_pretrained(GOLDEN / CLIP)
    names = [f"axis {i}" for i in range(6)]
    with pytest.raises(ValueError, match="no place for class names"):
        save_pretrained(tmp_path / "out", first.model, first.params, family="hf:clip", class_names=names)


def test_preprocessing_that_no_image_processor_does_is_left_out(tmp_path):
    """Nothing else would crop 24x12 as our own format says."""
    first = load_pretrained(GOLDEN / VIT, image_size=(24, 12))
    crop = replace(first.preprocess, crop_fraction=0.9)
    save_pretrained(tmp_path / "out", first.model, first.params, family="hf:vit", preprocess=crop)
    back = load_pretrained(tmp_path / "out")
    assert (back.preprocess, back.image_size) == (None, (24, 12))


# Bad input


def test_wrong_family_is_an_error_that_names_the_right_one():
    with pytest.raises(ValueError, match=r"does not look like family='hf:dinov2'.*It looks like hf:vit"):
        load_pretrained(GOLDEN / VIT, family="hf:dinov2")


def test_weights_without_config_json_are_an_error(tmp_path):
    shutil.copy(GOLDEN / VIT / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"number of heads.*config.json does.*Put it beside them"):
        load_pretrained(tmp_path / "model.safetensors")


def test_two_models_in_one_file_are_ambiguous(tmp_path):
    both = load_file(GOLDEN / SIGLIP / "model.safetensors") | load_file(GOLDEN / VIT / "model.safetensors")
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"could be any of hf:vit, hf:siglip: say which"):
        load_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(intermediate_size=48), r"vit.encoder.layer.0.intermediate.dense.weight: float32 \[40, 24\] in the file"),
        (dict(image_size=32), r"vit.embeddings.position_embeddings: float32 \[1, 17, 24\] in the file"),
        (dict(num_hidden_layers=3), r"the file has 2 blocks \(encoder\.layer\.0 to 1\..* and the model 3\."),
        (dict(num_hidden_layers=1), r"the file has 2 blocks \(encoder\.layer\.0 to 1\..* and the model 1\."),
        (dict(id2label={"0": "ant"}), "names 1 classes .* the head has 5 outputs"),
        (dict(hidden_act="mish"), "hidden_act='mish' in config.json is unknown here; known are gelu"),
        (dict(model_type="beit"), "of no known family.*config.json says model_type='beit'"),
    ],
)
def test_config_of_another_model_is_an_error(change, message, tmp_path):
    path = copy_of(VIT, tmp_path / "a", **change)
    with pytest.raises(ValueError, match=r"(?s)" + message) as error:
        load_pretrained(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("alone", [False, True])
def test_text_tower_alone_is_named(alone, tmp_path):
    path = copy_of("hf_CLIPModel", tmp_path / "a", **({"model_type": "clip_text_model"} if alone else {}))
    text = "text_model."
    rewrite(path, lambda t: {k.removeprefix(text if alone else ""): w for k, w in t.items() if k.startswith(text)})
    with pytest.raises(ValueError, match=r"a text tower without an image tower \('(text_model\.)?embeddings"):
        load_pretrained(path)


def test_nan_names_the_key(tmp_path):
    key = "vit.encoder.layer.1.attention.attention.key.bias"
    path = rewrite(copy_of(VIT, tmp_path / "a"), lambda t: t[key].__setitem__(3, np.nan))
    with pytest.raises(ValueError, match=f"{key}' holds 1 values that are NaN"):
        load_pretrained(path)


def test_truncated_file_is_named(tmp_path):
    file = copy_of(VIT, tmp_path / "a") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated.*Fetch it again"):
        load_pretrained(tmp_path / "a")


def test_naflex_is_refused_with_the_reason(tmp_path):
    path = copy_of(SIGLIP, tmp_path / "a", model_type="siglip2_vision_model")
    key = "embeddings.patch_embedding.weight"
    rewrite(path, lambda t: t | {key: t[key].reshape(24, -1)})
    with pytest.raises(ValueError, match="SigLIP2 NaFlex"):
        load_pretrained(path)


def test_classifier_that_skips_the_last_norm_is_left_over(tmp_path):
    path = rewrite(
        copy_of("hf_CLIPVisionModel_gelu", tmp_path / "a"),
        lambda t: t | {"classifier.weight": np.ones((5, 24), np.float32), "classifier.bias": np.ones(5, np.float32)},
    )
    with pytest.raises(ValueError, match=r"in the file only:  classifier.weight \[5, 24\]"):
        load_pretrained(path)
    assert load_pretrained(path, ignore=["^classifier"]).model.num_classes is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hf_ViTModel_names_in_memory", dict(pooler_act="relu"), "the pooler's activation is 'relu'"),
        ("hf_DINOv3ViTModel", dict(rope_theta=10000.0), "rope_theta=10000.0"),
    ],
)
def test_what_our_model_lacks_is_refused(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_pretrained(copy_of(name, tmp_path / "a", **change))
