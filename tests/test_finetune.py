"""A run that starts from a checkpoint: what is filled in, what is refused, what the first step sees, and resuming."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image

from configs import finetune
from tests.helpers import Cut, shrink, tiny_config
from vit_flax import load_pretrained, save_pretrained, workdir
from vit_flax.config import ConfigError
from vit_flax.convert import resample
from vit_flax.data.digits import read_digits
from vit_flax.job import build
from vit_flax.trainer import evaluate, train

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "vit_jax_prelinen.ckpt.npz"  # B/8 of width 32 and depth 3 for images of 32x32, 5 classes


def finetune_config(path=CHECKPOINT, *, size=(32, 48), **init) -> ConfigDict:
    """The tiny job on digits that are as large and as colourful as the checkpoint wants them."""
    config = tiny_config(run__total_steps=4, checkpoint__every_steps=2)
    config.init = dict(path=str(path), **init)
    config.model = dict(drop_path=0.1)
    config.augment = dict()
    ops = [dict(op="decode", channels=3), dict(op="resize", size_px=size)]
    config.data.train_transforms = config.data.eval_transforms = ops
    config.data.batch_size = config.data.eval_batch_size = 32
    config.evals.test.every_steps = 4
    return config


def flat(tree):
    return flatten_dict(jax.tree.map(np.asarray, tree), sep="/")


def first_state(config):
    job = build(config)
    return jax.jit(job.init)(job.pretrained())


def test_config_is_filled_in_from_the_checkpoint():
    job = build(finetune_config())
    assert job.config["model"]["num_classes"] == 10
    assert job.config["model"]["width"] == 32
    assert job.config["model"]["activation"] == "gelu_tanh"
    assert job.config["model"]["drop_path"] == 0.1
    assert job.config["augment"] == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert job.config["init"]["posemb_resize"] == "bilinear_align_corners"
    resize = job.config["data"]["eval_transforms"][1]
    assert (resize["filter"], resize["antialias"]) == ("bilinear", False)


def test_first_state_is_the_checkpoint_with_a_new_head(capsys):
    state = first_state(finetune_config())
    stored, ours = load_pretrained(CHECKPOINT), flat(state.params)
    theirs = flat(stored.params)
    table = resample.resample_posemb(theirs["posemb/table"], (4, 4), (4, 6), "bilinear_align_corners")
    np.testing.assert_array_equal(ours["posemb/table"], table)
    assert ours["head/kernel"].shape == (32, 10)
    assert not ours["head/kernel"].any()
    same = [path for path in theirs if not path.startswith(("head", "posemb"))]
    assert len(same) > 15
    for path in same:
        np.testing.assert_array_equal(ours[path], theirs[path])
    printed = capsys.readouterr().out
    assert "resampled      posemb/table [1, 16, 32] -> [1, 24, 32]: bilinear_align_corners" in printed
    assert "reinitialised  head/kernel [32, 10]: new head" in printed


def test_moving_average_and_looped_blocks_start_from_the_checkpoint():
    config = finetune_config()
    config.run.ema_decay = 0.9
    config.model.scan = False
    state = first_state(config)
    block = flat(load_pretrained(CHECKPOINT).params)["blocks/mlp/fc1/kernel"][1]
    np.testing.assert_array_equal(flat(state.params)["block_1/mlp/fc1/kernel"], block)
    np.testing.assert_array_equal(flat(state.ema)["block_1/mlp/fc1/kernel"], block)


def test_layer_wise_decay_works_on_loaded_parameters():
    config = finetune_config()
    config.optim.layer_decay = 0.5
    config.optim.warmup_steps = 0
    job = build(config)
    before = jax.jit(job.init)(job.pretrained())
    start = jax.tree.map(np.array, before.params)
    after, metrics = job.train_step()(before, next(job.train_batches(0)))
    moved = jax.tree.map(lambda a, b: float(abs(np.asarray(a) - b).max()), after.params, start)
    assert np.isfinite(float(metrics["loss"]))
    assert moved["head"]["kernel"] > 0


def of_ten_classes(folder, class_names=None):
    model = load_pretrained(CHECKPOINT, num_classes=10)
    model.params["head"]["bias"] = np.arange(10, dtype=np.float32)
    kept = dict(preprocess=model.preprocess, class_names=class_names)
    return save_pretrained(folder, model.model, model.params, family="vit_flax", **kept)


@pytest.mark.parametrize("num_classes", [None, 5, 10])
def test_head_of_other_classes_is_not_kept(num_classes):
    config = finetune_config(keep_head=True)
    if num_classes:
        config.model.num_classes = num_classes
    message = (
        r"the head of .* has 5 classes, and the data 10 classes \(0, 1, 2, 3, 4, \.\.\.\)\. Leave init\.keep_head out"
    )
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_head_is_kept_for_the_same_classes_in_the_same_order(tmp_path):
    """The data says nothing about its names first (digits are named by their numbers), and then names them."""
    config = finetune_config(of_ten_classes(tmp_path / "ten", NAMES), keep_head=True)
    build(config)
    images, labels = read_digits()
    np.savez(tmp_path / "digits.npz", train_images=images[:50], train_labels=labels[:50])
    config.data.source = dict(name="arrays", path=str(tmp_path / "digits.npz"), class_names=NAMES)
    config.data.train_split = config.data.eval_split = "train"
    complete = build(config).config
    config.data.source.class_names = (NAMES[1], NAMES[0], *NAMES[2:])
    message = (
        r"(?s)2 of the 10 classes of .*class 0: the data says 'one', the checkpoint 'zero'.*Leave init\.keep_head out"
    )
    with pytest.raises(ConfigError, match=message):
        build(config)
    with pytest.raises(ConfigError, match=message):  # the config of a run, given other data
        build({**complete, "data": config.data.to_dict()}).pretrained()
    config.init.override = ("class_names",)
    build(config).pretrained()
    config.model.num_classes = 5
    with pytest.raises(ConfigError, match=r"checkpoint fills them in\.$"):  # nothing may override the number
        build(config)


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_head_of_the_same_size_is_replaced_unless_kept(tmp_path):
    ten = of_ten_classes(tmp_path / "ten")
    assert not flat(first_state(finetune_config(ten)).params)["head/bias"].any()
    kept = flat(first_state(finetune_config(ten, keep_head=True)).params)["head/bias"]
    np.testing.assert_array_equal(kept, np.arange(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=dict(width=64)), r"(?s)model\.width: the config says 64, the checkpoint 32.*Write width=32"),
        (dict(model=dict(variant="Ti/8")), r"(?s)model\.width.*model\.depth: the config says 12, the checkpoint 3"),
        (dict(model=dict(activation="gelu")), "Write activation='gelu_tanh'"),
        (dict(augment=dict(mean=(0.4,))), r"augment\.mean is \(0\.4,\).*init\.preprocess='checkpoint' or 'config'"),
        (dict(init=dict(path="")), r"init: path is empty.*--config\.init\.path="),
        (dict(init=dict(path="nowhere.npz")), "init: nowhere.npz: there is no such file"),
        (dict(init=dict(preprocess="mine")), "expected one of agree, checkpoint, config"),
        (dict(init=dict(override=("wdith",))), r"override=\['wdith'\]"),
        (dict(init=dict(famliy="google")), "unknown key init.famliy: did you mean init.family?"),
        (dict(init=dict(family="big_vision")), "does not look like family='big_vision'.*It looks like google"),
    ],
)
def test_what_disagrees_is_named_with_the_remedy(change, message):
    config = finetune_config()
    for section, values in change.items():
        config[section] = {**config[section].to_dict(), **values}
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_model_without_pooling_needs_one():
    path = CHECKPOINT.with_name("timm_ours_to_timm_every_token_by_itself")
    config = finetune_config(path, size=(16, 16))
    with pytest.raises(ConfigError, match=r"gives every token by itself.*init\.override=\('pool',\)"):
        build(config)
    config.init.override = ("pool",)
    config.model.pool = "gap"
    assert build(config).config["model"]["pool"] == "gap"


@pytest.mark.parametrize("preprocess", ["agree", "checkpoint", "config"])
def test_checkpoint_that_does_not_say_how_pictures_were_prepared(preprocess, tmp_path):
    model = load_pretrained(CHECKPOINT)
    save_pretrained(tmp_path / "bare", model.model, model.params, family="vit_flax")
    config = finetune_config(tmp_path / "bare", preprocess=preprocess)
    with pytest.raises(
        ConfigError, match=r"bare does not say how its pictures .*: write augment\.mean and augment\.std"
    ):
        build(config)
    config.augment = dict(mean=(0.4,), std=(0.2,))
    config.init.preprocess = "config"
    assert build(config).config["augment"]["mean"] == (0.4,)


def test_filters_that_disagree():
    config = finetune_config()
    config.data.train_transforms = [dict(op="decode"), dict(op="resize", size_px=(32, 48), filter="bicubic")]
    with pytest.raises(ConfigError, match=r"filter of 'resize' in data\.train_transforms is 'bicubic'.*'bilinear'"):
        build(config)
    config.init.preprocess = "checkpoint"
    config.data.train_transforms.append(dict(op="randaugment", spec="randaug(2,15)", filter="nearest"))
    _, resize, policy = build(config).config["data"]["train_transforms"]
    assert resize["filter"] == "bilinear"
    assert (policy["filter"], "antialias" in policy) == ("nearest", False)  # it resizes nothing
    config.init.preprocess = "config"
    config.augment = dict(mean=(0.4,), std=(0.2,))
    job = build(config)
    assert job.config["data"]["train_transforms"][1]["filter"] == "bicubic"
    assert job.config["augment"]["mean"] == (0.4,)


def test_another_pooling_and_patch_size_are_possible_and_said(capsys):
    config = finetune_config(override=("pool", "patch_size"), size=(32, 32))
    config.model.update(dict(pool="gap", patch_size=16))
    ours = flat(first_state(config).params)
    assert build(config).model.pool == "gap"
    assert ours["patch_embed/kernel"].shape == (16 * 16 * 3, 32)
    assert ours["posemb/table"].shape == (1, 4, 32)
    assert "resampled      patch_embed/kernel [192, 32] -> [768, 32]" in capsys.readouterr().out


def test_grey_pictures_adapt_the_patch_embedding():
    config = finetune_config(size=(32, 32))
    config.data.train_transforms = config.data.eval_transforms = [
        dict(op="decode", channels=1),
        dict(op="resize", size_px=32),
    ]
    kernel = load_pretrained(CHECKPOINT).params["patch_embed"]["kernel"]
    ours = flat(first_state(config).params)["patch_embed/kernel"]
    np.testing.assert_allclose(ours, kernel.reshape(8, 8, 3, 32).sum(2).reshape(64, 32), rtol=1e-6)


def test_resumed_run_needs_the_checkpoint_no_more_and_ends_alike(tmp_path, monkeypatch):
    """The whole path, with the checkpoint taken away between the two lives of the second run."""
    checkpoint = Path(shutil.copy(CHECKPOINT, tmp_path / "start.npz"))
    config = finetune_config(checkpoint)
    whole, results = train(config, tmp_path / "whole")
    from vit_flax import job

    batches = job.Job.train_batches

    monkeypatch.setattr(job.Job, "train_batches", lambda self, start: Cut(batches(self, start), 3, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed")
    monkeypatch.undo()
    checkpoint.unlink()
    resumed, again = train(config, tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    assert again["test/top1"] == results["test/top1"]
    assert evaluate(config, tmp_path / "resumed")["test/top1"] == results["test/top1"]
    config.run.log_every_steps, config.data.eval_batch_size = 3, 16
    config.evals.second = dict(type="classification", every_steps=0)
    changed = build(config, completed=workdir.completed(tmp_path / "resumed", config))
    assert (changed.run.log_every_steps, changed.data.eval_batch_size) == (3, 16)
    assert evaluate(config, tmp_path / "resumed")["second/top1"] == results["test/top1"]
    # Another experiment than the one in the workdir is still noticed, and a new run still wants its checkpoint.
    config.init.keep_head = True
    with pytest.raises(ConfigError, match=r"start\.npz: there is no such file"):
        train(config, tmp_path / "resumed")


def test_another_checkpoint_under_the_same_name_is_another_experiment(tmp_path):
    checkpoint = Path(shutil.copy(CHECKPOINT, tmp_path / "start.npz"))
    config = finetune_config(checkpoint)
    job = build(config)
    weights = dict(np.load(CHECKPOINT))
    weights["embedding/bias"] += 1
    np.savez(checkpoint, **weights)
    assert build(config).identity() != job.identity()
    with pytest.raises(ConfigError, match="is another checkpoint than the one"):
        build(job.config).pretrained()


def test_run_of_ours_is_a_checkpoint_like_any_other(tmp_path):
    """Trains, loads the workdir, fine-tunes from it: the pretrained start is ahead of a fresh one."""
    state, _ = train(tiny_config(run__ema_decay=0.5, run__total_steps=60, optim__lr=1e-2), tmp_path / "first")
    loaded = load_pretrained(tmp_path / "first")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(state.params))
    assert loaded.class_names == tuple(map(str, range(10)))
    assert (loaded.preprocess.image_size, loaded.preprocess.mean) == ((8, 8), (0.5,))
    average = load_pretrained(f"{tmp_path / 'first'}:ema")
    jax.tree.map(np.testing.assert_array_equal, average.params, jax.device_get(state.ema))
    step = load_pretrained(tmp_path / "first" / "checkpoints" / "60")
    jax.tree.map(np.testing.assert_array_equal, step.params, loaded.params)
    best = load_pretrained(f"{tmp_path / 'first'}:best:ema")
    assert best.report.path.endswith(":best:ema")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint 61 below"):
        load_pretrained(tmp_path / "first" / "checkpoints" / "61")

    config = tiny_config(run__total_steps=2, optim__lr=1e-2)
    fresh = train(config, tmp_path / "fresh")[1]["test/loss"]
    config.init = dict(path=str(tmp_path / "first"), keep_head=True)
    config.model = dict(drop_path=0.1)
    tuned = train(config, tmp_path / "tuned")[1]["test/loss"]
    assert tuned < fresh - 0.1


def test_filter_of_a_run_that_no_preprocess_can_say(tmp_path):
    config = tiny_config(run__total_steps=1, optim__warmup_steps=0)
    config.data.eval_transforms = [dict(op="decode", channels=1), dict(op="resize", size_px=8, filter="lanczos")]
    train(config, tmp_path)
    assert load_pretrained(tmp_path).preprocess is None
    tuned = finetune_config(tmp_path, size=8)
    tuned.data.train_transforms = [dict(op="decode", channels=3), dict(op="inception_crop", size_px=8)]
    filled = build(tuned).config["data"]
    assert filled["eval_transforms"][1] == dict(op="resize", size_px=8, filter="lanczos", antialias=True)
    assert filled["train_transforms"][1]["filter"] == "lanczos"


def test_shipped_config_on_a_folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 5)):
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{i}.png")
    config = shrink(finetune.get_config(f"{CHECKPOINT},{tmp_path / 'pictures'},64"))
    job = build(config)
    assert job.config["model"]["num_classes"] == 2
    assert job.data.class_names == ("cat", "dog")
    assert job.config["data"]["train_transforms"][0]["antialias"] is False
    state, results = train(config, tmp_path / "run")
    assert state.params["posemb"]["table"].shape == (1, 64, 32)
    assert results["test/count"] == 10
    again = load_pretrained(tmp_path / "run")
    assert again.preprocess.crop_fraction == pytest.approx(64 / 73)
    ways = (again.report.posemb_resize, again.report.patch_resize)
    assert ways == ("bilinear_align_corners", "bilinear_antialias")


@pytest.mark.parametrize(("held_out", "split"), [("val", "val"), ("test", "test"), ("Validation", "validation")])
def test_shipped_config_evaluates_on_the_split_that_there_is(tmp_path, held_out, split):
    for path in (tmp_path / folder / name for folder in ("train", held_out) for name in ("cat", "dog")):
        path.mkdir(parents=True)
    config = finetune.get_config(f"{CHECKPOINT},{tmp_path}")
    assert (config.data.eval_split, config.data.eval_transforms[1]["size_px"]) == (split, 224)


@pytest.mark.parametrize(
    "argument", ["vit.npz", "vit.npz,", ",digits", "vit.npz,digits,big", "vit.npz,digits,32,8", ""]
)
def test_shipped_config_says_which_arguments_it_takes(argument):
    with pytest.raises(ValueError, match=r"expected CHECKPOINT,DATA\[,SIZE\].*found '" + argument):
        finetune.get_config(argument)
