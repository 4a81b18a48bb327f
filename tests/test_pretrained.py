"""`load_pretrained` beyond parity: what the caller may change, what is refused and how it says so."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from vit_flax import Pretrained, ViT, load_pretrained, save_pretrained
from vit_flax.convert import Preprocess
from vit_flax.convert.describe import digest
from vit_flax.convert.source import open_source, weight_files
from vit_flax.models.posemb import FIXED_TABLES

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "vit_jax_prelinen.ckpt.npz"  # B/8 of width 32 and depth 3 for images of 32x32, 5 classes


def flat(params):
    return flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    return load_pretrained(CHECKPOINT)


@pytest.fixture
def own(pretrained, tmp_path):
    """The same in our own format, to be damaged."""
    save_pretrained(tmp_path / "own", pretrained.model, pretrained.params, family="vit_flax")
    return tmp_path / "own"


def test_the_digest_sees_the_biases_of_stacked_blocks(pretrained, own, tmp_path):
    params = jax.tree.map(np.copy, pretrained.params)
    params["blocks"]["mlp"]["fc1"]["bias"][1, 0] += 1
    save_pretrained(tmp_path / "other", pretrained.model, params, family="vit_flax")
    assert digest(open_source(str(own))) != digest(open_source(str(tmp_path / "other")))


def changed(change, path=CHECKPOINT, tmp=None):
    """The checkpoint with its tensors changed."""
    weights = dict(np.load(path))
    change(weights)
    np.savez(tmp / "changed.npz", **weights)
    return tmp / "changed.npz"


def test_report_accounts_for_everything(pretrained):
    assert set(pretrained.report.loaded) == set(flat(pretrained.params))
    assert not pretrained.report.unused
    assert str(pretrained.report) == f"{CHECKPOINT}: google, 25 parameters loaded"


def test_new_head_image_size_patch_size_and_channels():
    new = load_pretrained(CHECKPOINT, num_classes=7, image_size=(64, 32), patch_size=16, channels=1)
    params = flat(new.params)
    assert params["head/kernel"].shape == (32, 7)
    assert params["posemb/table"].shape == (1, 8, 32)
    assert params["patch_embed/kernel"].shape == (256, 32)
    assert new.preprocess.image_size == (64, 32)
    assert len(new.preprocess.mean) == 1
    text = str(new.report)
    assert "resampled      patch_embed/kernel [192, 32] -> [256, 32]: bilinear_antialias, 3 -> 1 channels" in text
    assert "resampled      posemb/table [1, 16, 32] -> [1, 8, 32]: bilinear_align_corners" in text
    assert "reinitialised  head/kernel [32, 7]: new head" in text
    run = jax.jit(lambda params, images: new.model.apply({"params": params}, images, train=False)[0])
    logits = run(new.params, jnp.zeros((1, 64, 32, 1)))
    assert logits.shape == (1, 7)


def test_no_head_gives_features():
    new = load_pretrained(CHECKPOINT, num_classes=0)
    assert new.model.num_classes is None
    assert "head/kernel" not in flat(new.params)
    assert new.report.unused["head/kernel"] == ("replaced with the head", (32, 5))


def test_new_head_of_the_same_size_on_request(pretrained):
    same = load_pretrained(CHECKPOINT, num_classes=5)
    np.testing.assert_array_equal(same.params["head"]["kernel"], pretrained.params["head"]["kernel"])
    new = load_pretrained(CHECKPOINT, num_classes=5, new_head=True)
    assert not new.params["head"]["kernel"].any()
    assert new.report.reinitialised["head/kernel"] == ("new head", (32, 5))


@pytest.mark.parametrize("pattern", ["^embedding/bias$", "^patch_embed/bias$"])
def test_ignore_leaves_out_what_either_side_is_called(pattern, pretrained):
    new = load_pretrained(CHECKPOINT, ignore=[pattern])
    assert pretrained.params["patch_embed"]["bias"].any()
    assert not new.params["patch_embed"]["bias"].any()
    assert new.report.unused == {"embedding/bias": ("excused by ignore", (32,))}
    assert new.report.missing == {"patch_embed/bias": (32,)}
    assert len(new.report.loaded) == len(pretrained.report.loaded) - 1


def test_image_size_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match=r"image_size=\(30, 32\): the patch size \(8, 8\) does not divide it"):
        load_pretrained(CHECKPOINT, image_size=(30, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(image_size=0),
            "image_size=0: expected a whole number of 1 or more, or two of them: rows and columns",
        ),
        (dict(image_size=(32, -32)), "image_size=(32, -32): expected"),
        (dict(patch_size=0), "patch_size=0: expected"),
        (dict(channels=0), "channels=0: expected a whole number of 1 or more."),
        (dict(num_classes=-1), "num_classes=-1: expected a whole number of 0 or more."),
        (dict(posemb_resize="lanczos"), "posemb_resize='lanczos' is unknown: expected one of bicubic, "),
        (dict(fields={"scan": False}), "fields={'scan': False}: parameters are loaded with the blocks stacked"),
        (dict(fields={"widht": 3}), "fields={'widht': 3}: ViT has no field 'widht' (nearest: width)."),
        (
            dict(fields={"pool": "avg"}),
            f"fields={{'pool': 'avg'}} makes no model of {CHECKPOINT}: model.pool='avg' is unknown",
        ),
        (dict(fields={"mlp_dim": "big"}), f"fields={{'mlp_dim': 'big'}} makes no model of {CHECKPOINT}: "),
        (dict(fields={"depth": 4}), "and the model 4. The configuration (or the argument `fields`) does not belong to"),
        (dict(fields={"width": 64}), "The configuration (or the argument `fields`) does not belong to these weights"),
        (dict(ignore="head"), "ignore='head': expected a list of regular expressions, such as ['head']"),
        (dict(ignore=["("]), "ignore: '(' is no regular expression"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(CHECKPOINT, **arguments)


def test_unknown_and_wrong_families(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown family 'gogle': expected one of google, big_vision"):
        load_pretrained(CHECKPOINT, family="gogle")
    with pytest.raises(
        ValueError, match=r"prelinen\.ckpt\.npz does not look like family='big_vision'.*looks like google"
    ):
        load_pretrained(CHECKPOINT, family="big_vision")
    np.savez(tmp_path / "strange.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"strange\.npz is of no known family: its 1 tensors begin with \['weight'\]"):
        load_pretrained(tmp_path / "strange.npz")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text tower without an image tower"),
        ("txt/Encoder_0/encoder_norm/scale", "a text tower without an image tower"),
        ("params/txt/Encoder_0/encoder_norm/scale", "a text tower without an image tower"),
        ("blocks.0.attn.relative_position_bias_table", "a BEiT or Swin model"),
        ("conv_root/kernel", "a hybrid: its patches come from a ResNet"),
    ],
)
def test_what_is_out_of_scope_is_named(key, what, tmp_path):
    save_file({key: np.zeros((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors looks like {what}.*'{key.partition('.')[0]}"):
        load_pretrained(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("prefixes", "family", "said", "taken"),
    [
        (["module."], None, "of its 35 names, 35 begin with 'module.', as", "module."),
        (["_orig_mod.module."], "meta:dinov2", "35 begin with '_orig_mod.module.', as", "_orig_mod.module."),
        (["model.", "ema."], None, "of its 70 names, 35 begin with 'ema.' and 35 begin with 'model.', as", "ema."),
    ],
)
def test_what_training_left_in_front_of_the_names_is_named(prefixes, family, said, taken, tmp_path, monkeypatch):
    weights = load_file(GOLDEN / "meta_dinov2" / "model.safetensors")
    shutil.copy(GOLDEN / "meta_dinov2" / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    save_file({p + name: w for p in prefixes for name, w in weights.items()}, "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_pretrained("model.safetensors", family=family)
    exec(str(error.value).partition('python -c "')[2].rstrip('"'))
    assert load_pretrained("unwrapped.safetensors").report.family == "meta:dinov2"
    assert repr(taken) in str(error.value).partition("python")[2]


def test_two_models_in_one_file(tmp_path):
    def add_average(weights):
        weights |= {f"opt/target/{name}": 2 * w for name, w in weights.items()}

    with pytest.raises(ValueError, match=r"changed\.npz: '.*' and \d+ more have the same names in google.*two models"):
        load_pretrained(changed(add_average, tmp=tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(value, tmp_path):
    def damage(weights):
        weights["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"][3, 5] = value

    key = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    with pytest.raises(ValueError, match=rf"changed\.npz: '{key}' holds 1 values that are NaN or infinite.*older"):
        load_pretrained(changed(damage, tmp=tmp_path))


def test_extreme_but_finite_numbers_are_loaded(tmp_path):
    def enlarge(weights):
        weights["head/kernel"][:] = 3e38  # their sum is infinite

    assert load_pretrained(changed(enlarge, tmp=tmp_path)).params["head"]["kernel"].max() > 1e38


def test_numbers_too_large_for_float32_are_named(tmp_path):
    def enlarge(weights):
        weights["head/kernel"] = weights["head/kernel"].astype(np.float64) * 1e200

    with pytest.raises(ValueError, match=r"'head/kernel' holds 160 values that are NaN or infinite in float32"):
        load_pretrained(changed(enlarge, tmp=tmp_path))


@pytest.mark.parametrize("number", [1, 4])
def test_number_of_blocks_that_disagrees_is_one_error(number, pretrained, tmp_path):
    path = save_pretrained(tmp_path / "hf", pretrained.model, pretrained.params, family="hf:vit")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": number}))
    with pytest.raises(ValueError, match=rf"the file has 3 blocks \(.* and the model {number}\. The configuration"):
        load_pretrained(path)


def test_the_first_blocks_alone(pretrained):
    first = load_pretrained(CHECKPOINT, fields={"depth": 2}, ignore=["encoderblock_2/"])
    kernel = pretrained.params["blocks"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(first.params["blocks"]["mlp"]["fc1"]["kernel"], kernel[:2])


def test_shapes_that_disagree_with_the_configuration(own):
    config = json.loads((own / "config.json").read_text())
    config["model"] |= {"width": 64, "mlp_dim": 128}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"(?s)own: shapes or types disagree.*blocks/mlp/fc1/kernel: float32 \[3, 32, 64\] in the"
    ):
        load_pretrained(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("channels"), "KeyError: 'channels'"),
        (lambda c: c["model"].update(widht=3), "unexpected keyword argument 'widht'"),
        (lambda c: c["model"].update(pool="avg"), r"model\.pool='avg' is unknown"),
        (lambda c: c["model"].update(mlp_dim=2.5), "describes no vit_flax model"),
        (lambda c: c.update(model=None), "describes no vit_flax model"),
        (lambda c: c.update(probabilities="relu"), "probabilities='relu': expected one of softmax, sigmoid"),
        (lambda c: c.update(class_names=["one", "two"]), "names 2 classes and the head has 5 outputs"),
    ],
)
def test_configuration_that_makes_no_model(change, message, own):
    config = json.loads((own / "config.json").read_text())
    change(config)
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"(?s)own: .*{message}"):
        load_pretrained(own)


def test_configuration_with_too_short_a_list(own, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"grid": [4]}))
    with pytest.raises(ValueError, match="describes no vit_flax model"):
        load_pretrained(own)


def test_tensors_without_parameters_and_the_reverse(tmp_path):
    def rename(weights):
        weights["Transformer/encoder_norm/scales"] = weights.pop("Transformer/encoder_norm/scale")

    with pytest.raises(ValueError, match="1 tensors of the file have no place") as error:
        load_pretrained(changed(rename, tmp=tmp_path))
    text = str(error.value)
    assert "+ in the file only:  Transformer/encoder_norm/scales [32] (nearest: Transformer/encoder_norm/scale)" in text
    assert "- in the model only: norm/scale [32], looked for as Transformer/encoder_norm/scale (nearest:" in text
    # What the message proposes works.
    patterns = text.partition("ignore=")[2]
    new = load_pretrained(tmp_path / "changed.npz", ignore=eval(patterns))
    assert new.report.missing == {"norm/scale": (32,)}
    assert (new.params["norm"]["scale"] == 1).all()


def test_what_the_message_proposes_leaves_the_rest_alone(pretrained, tmp_path):
    def add(weights):
        weights |= {f"Transformer/encoderblock_{i}/Gate_{j}/scale": np.ones(3) for i in range(3) for j in range(3)}

    with pytest.raises(ValueError, match="9 tensors of the file have no place") as error:
        load_pretrained(changed(add, tmp=tmp_path))
    patterns = eval(str(error.value).partition("ignore=")[2])
    assert patterns == [r"^Transformer/encoderblock_\d+/Gate_\d+/"]
    new = load_pretrained(tmp_path / "changed.npz", ignore=patterns)
    assert new.report.loaded == pretrained.report.loaded
    assert len(new.report.unused) == 9


def test_paths_may_begin_with_the_home_directory(pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written = save_pretrained("~/own", pretrained.model, pretrained.params, family="vit_flax")
    assert written == tmp_path / "own"
    assert load_pretrained("~/own").report.loaded == pretrained.report.loaded
    assert weight_files("~/own") == [written / "model.safetensors"]


def test_how_a_model_is_compiled_does_not_stop_an_export(pretrained, tmp_path):
    model = pretrained.model.clone(scan_unroll=3, remat="full", drop_path=0.1)
    save_pretrained(tmp_path / "hf", model, pretrained.params, family="hf")


@pytest.mark.parametrize("params", [{}, {"params": {"norm": {"scale": np.ones(32, np.float32)}}}])
def test_parameters_of_no_model_are_not_written(params, pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"there is no patch_embed/kernel, only \[.*Give the tree below 'params'"):
        save_pretrained(tmp_path / "out", pretrained.model, params, family="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(preprocess=Preprocess((8, 8))), "The position table has 16 patches, not 1 x 1: give the image size"),
        (dict(image_size=(32, 8)), "The position table has 16 patches, not 4 x 1: give the image size"),
        (dict(preprocess=Preprocess((32, 36))), "image_size=(32, 36): patches of (8, 8) pixels do not divide it"),
        (dict(image_size=32, preprocess=Preprocess((16, 64))), "image_size=(32, 32), and preprocess has (16, 64)"),
        (dict(class_names="abcde"), "class_names='abcde': expected a list of names, one per class"),
        (dict(class_names=["a"]), "1 class names for num_classes=5"),
        (dict(probabilities="relu"), "probabilities='relu' is unknown: expected one of softmax, sigmoid"),
    ],
)
def test_what_goes_with_the_weights_is_checked(given, message, pretrained, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        save_pretrained(tmp_path / "out", pretrained.model, pretrained.params, family="vit_flax", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [dict(image_size=(16, 64)), dict(preprocess=Preprocess((16, 64)))])
def test_image_size_says_what_the_rows_of_a_table_are(size, pretrained, tmp_path):
    save_pretrained(tmp_path / "out", pretrained.model, pretrained.params, family="vit_flax", **size)
    assert load_pretrained(tmp_path / "out").image_size == (16, 64)


@pytest.mark.parametrize("posemb", FIXED_TABLES)
@pytest.mark.parametrize("family", ["timm", "hf", "npz"])
def test_fixed_positions_are_written_as_a_table(family, posemb, tmp_path):
    activation = "gelu_tanh" if family == "npz" else "gelu"
    sizes = dict(num_classes=3, patch_size=4, width=8, depth=1, mlp_dim=32, num_heads=2)
    model = ViT(posemb=posemb, norm_eps=1e-6, activation=activation, **sizes)
    size = (8, 8) if family == "npz" else (8, 12)  # that format does not say how many rows a table has
    images = jax.random.normal(jax.random.key(0), (1, *size, 3))
    params = jax.tree.map(lambda w: w + 0.1, model.init(jax.random.key(1), images, train=False)["params"])
    save_pretrained(tmp_path / "out", model, params, family=family, image_size=size)
    again = load_pretrained(tmp_path / "out")
    assert again.model.posemb == ("sincos2d" if (family, posemb) == ("npz", "sincos2d") else "learned")
    expected, found = (
        jax.jit(lambda params, model=model: model.apply({"params": params}, images, train=False)[0])(params)
        for model, params in ((model, params), (again.model, again.params))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [np.arange(5), np.array(list("01234"))])
def test_class_names_may_be_an_array(names, pretrained, tmp_path):
    save_pretrained(tmp_path / "out", pretrained.model, pretrained.params, family="hf", class_names=names)
    assert load_pretrained(tmp_path / "out").class_names == tuple("01234")


@pytest.mark.parametrize("family", ["hf", "timm", "npz", "vit_flax"])
def test_parameters_that_are_not_finite_are_not_written(family, pretrained, tmp_path):
    params = jax.tree.map(np.array, pretrained.params)
    params["head"]["kernel"][1, 2] = np.nan
    with pytest.raises(ValueError, match=r"not finite: head/kernel\. Write an earlier"):
        save_pretrained(tmp_path / "out", pretrained.model, params, family=family)
    assert not (tmp_path / "out").exists()


def test_written_files_are_for_all_whom_the_umask_lets(pretrained, tmp_path):
    path = save_pretrained(tmp_path / "hf", pretrained.model, pretrained.params, family="hf")
    (tmp_path / "usual").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_integers_are_no_weights(own):
    weights = load_file(own / "model.safetensors")
    weights["norm/bias"] = weights["norm/bias"].astype(np.int32)
    save_file(weights, own / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm/bias: int32 \[32\] in the file, and norm/bias needs \[32\]"):
        load_pretrained(own)


def test_nothing_is_fetched_unless_an_address_was_given(monkeypatch):
    import socket

    def refuse(*arguments, **keywords):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    load_pretrained(CHECKPOINT)


def test_fields_change_how_and_not_what(pretrained):
    fast = load_pretrained(CHECKPOINT, fields={"dtype": "bfloat16", "remat": "full"})
    assert fast.model.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, fast.params, pretrained.params)
