"""Every config, shrunk, goes all the way; and the design that this project was asked for is the one in its config."""

import importlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet_s16, vit_from_scratch_512
from tests.helpers import shrink, tiny_config
from vit_flax.config import in_steps
from vit_flax.job import build
from vit_flax.models import ViT, make_model
from vit_flax.trainer import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_evaluates_checkpoints_and_resumes(name, tmp_path):
    config = shrink(importlib.import_module(f"configs.{name}").get_config())
    config.data.eval_split += "[:16]"
    state, results = train(config, tmp_path)
    assert int(state.step) == 2
    assert any(key.endswith("/top1") for key in results)
    with config.unlocked():
        config.run.log_every_steps = 2
    assert int(train(config, tmp_path)[0].step) == 2


def test_shrinking_keeps_what_is_on():
    config = shrink(tiny_config(model__drop_path=0.3, run__ema_decay=0.9))
    assert (config.model.drop_path, config.run.ema_decay) == (0.3, 0.9)


def number_of_parameters(argument: str) -> int:
    model = make_model(**vit_from_scratch_512.get_config(argument).model.to_dict())
    patches = jax.ShapeDtypeStruct((2, 256, 3072), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), patches)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_design_has_the_parameters_that_keras_counts_and_the_position_table():
    table = 256 * 768  # a functional Keras model does not track it
    assert number_of_parameters("") == 399_155_722 + table
    assert number_of_parameters("standard") == 87_621_130
    for count in ("399,352,330", "87,621,130"):
        assert count in vit_from_scratch_512.__doc__


def test_design_cuts_a_picture_into_256_patches_of_3072_numbers():
    job = build(vit_from_scratch_512.get_config())
    assert job.data.image_shape == (512, 512, 3)
    abstract = jax.eval_shape(job.init)
    assert abstract.params["posemb"]["table"].shape == (1, 256, 768)
    assert abstract.params["patch_embed"]["kernel"].shape == (3072, 768)


def test_published_recipe_has_the_published_numbers():
    config = imagenet_s16.get_config("tfds").to_dict()
    steps_per_epoch = imagenet_s16.IMAGES / config["data"]["batch_size"]
    assert in_steps("run", config["run"], steps_per_epoch)["total_steps"] == 111_477
    assert in_steps("optim", config["optim"], steps_per_epoch)["warmup_steps"] == 10_000
    assert (config["data"]["train_split"], config["data"]["eval_split"]) == ("train[:99%]", "validation")
    assert config["evals"]["minival"]["split"] == "train[99%:]"
    crop, whole = config["data"]["train_transforms"][0], config["data"]["eval_transforms"][0]
    assert (crop["area"], crop["aspect"], crop["antialias"], whole["filter"]) == (
        (0.05, 1),
        (0.75, 1.33),
        False,
        "area",
    )
    model = make_model(**config["model"])
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)["params"]
    published = 21_974_632  # with a linear head; arXiv:2205.01580 compares both
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published + 384 * 384 + 384


def test_published_recipe_on_a_folder_has_its_classes_and_its_validation_pictures(tmp_path):
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537", "n01484850"):
            (tmp_path / split / name).mkdir(parents=True)
    config = imagenet_s16.get_config(str(tmp_path))
    assert config.model.num_classes == 3
    assert (config.data.train_split, config.data.eval_split) == ("train", "val")
    assert config.data.source.to_dict() == {"name": "folder", "root": str(tmp_path)}


def test_design_computes_what_keras_computes():
    """golden/make_keras.py: the same layers, small, with random weights; the input is already cut into patches."""
    golden = np.load(ROOT / "tests" / "golden" / "vit_from_scratch.npz")
    depth = 3

    def pick(name, theirs=("kernel", "bias"), ours=("kernel", "bias")):
        return {o: golden[f"{name}/{t}"] for o, t in zip(ours, theirs)}

    def norm(name):
        return pick(name, ("gamma", "beta"), ("scale", "bias"))

    def block(i):
        names = {"query": "query", "key": "key", "value": "value", "out": "attention_output"}
        return {
            "norm1": norm(f"norm1_{i}"),
            "attention": {ours: pick(f"attention_{i}/{theirs}") for ours, theirs in names.items()},
            "norm2": norm(f"norm2_{i}"),
            "mlp": {name: pick(f"{name}_{i}") for name in ("fc1", "fc2")},
        }

    params = {
        "patch_embed": pick("patch_embed"),
        "posemb": {"table": golden["posemb/embeddings"][None]},
        "cls_token": {"token": golden["cls_token/token"]},
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, range(depth))),
        "norm": norm("norm"),
        "head": pick("head"),
    }
    fields = vit_from_scratch_512.get_config().model.to_dict()
    sizes = dict(patch_size=8, width=24, depth=depth, mlp_dim=48, num_heads=3, head_dim=24)
    model = ViT(**{k: v for k, v in fields.items() if k != "variant"} | sizes)
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(partial(model.apply, train=False))({"params": params}, golden["patches"])
    assert np.abs(golden["logits"]).max() > 0.5
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=0)
