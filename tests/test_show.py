"""The picture of a batch: what it shows is what the step gets."""

import io
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_config
from vit_flax import step as step_module
from vit_flax.augment import augment
from vit_flax.config import bind
from vit_flax.data import show
from vit_flax.job import build

ROOT = Path(__file__).parent.parent


def test_the_training_batch_is_the_one_of_the_step():
    config = tiny_config(augment__mixup_alpha=0.4)
    del config.augment["affine"]  # it takes long to compile
    job = build(config)
    seen = {}

    def apply(variables, images, *, train, rngs, hparams):
        seen["images"] = images
        return jnp.zeros((images.shape[0], 10)), {}

    def loss(logits, targets, mask, *, hparams):
        seen["targets"] = targets
        return jnp.zeros(())

    state = job.init().replace(step=jnp.int32(3))
    objective = partial(
        step_module.classification,
        apply=apply,
        augment=bind(augment, "augment", job.sections["augment"]),
        loss=loss,
        num_classes=10,
    )
    batches = job.train_batches(3)
    # Not jitted: what `train_step` does with its key, and then the objective itself.
    key = jax.random.fold_in(state.key, state.step)
    objective({}, jax.device_put(next(batches), jax.devices()[0]), key, state.hparams)
    drawn, targets, pixels = show._train_batch(job, 3)
    np.testing.assert_allclose(pixels, seen["images"], atol=1e-5)
    np.testing.assert_allclose(targets, seen["targets"], atol=1e-6)
    assert (targets.max(axis=1) < 0.99).any()  # mixup is on
    assert np.abs(drawn / 255 - (pixels * 0.5 + 0.5)).max() <= 0.5 / 255 + 1e-5


def test_both_grids_are_written(tmp_path):
    config = tiny_config()
    lines = show.show(config, tmp_path / "batch.png", max_images=9)
    assert "training, step 0: batch of 64 images, 8x8x1; the model gets mean -0." in lines[0]
    assert "evaluation: split of 359 images, 8x8x1" in lines[1]
    with Image.open(tmp_path / "batch.png") as picture:
        drawn = np.asarray(picture)
    first = np.asarray(Image.open(io.BytesIO(build(config).data.eval_source[0]["image"])))
    middle = len(drawn) // 2
    tile = drawn[middle + 24 + 6 : middle + 24 + 6 + 96, 6 : 6 + 96, 0]
    np.testing.assert_array_equal(tile, first.repeat(12, axis=0).repeat(12, axis=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "batch.jpg"}, "must be a .png file"),
        ({"out": "nowhere/batch.png"}, "in a folder that exists"),
        ({"step": -1}, "--step=-1"),
        ({"max_images": 0}, "--max_images=0"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(tmp_path, arguments, message):
    arguments = {"out": "batch.png", **arguments}
    with pytest.raises(ValueError, match=message):
        show.show({}, tmp_path / arguments.pop("out"), **arguments)


def test_command(tmp_path):
    def launch(*words):
        command = [sys.executable, "-m", "vit_flax.data.show", "--config", "tests/configs/tiny.py", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)

    done = launch("--out", tmp_path / "batch.png", "--step=2", "--config.data.batch_size=16")
    assert done.returncode == 0, done.stderr
    assert "training, step 2: batch of 16 images" in done.stdout
    assert (tmp_path / "batch.png").exists()
    wrong = launch("--out", tmp_path / "batch.png", "--config.model.num_classes=3")
    assert wrong.returncode == 2
    assert "the data has 10 classes" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    unknown = launch("--out", tmp_path / "batch.png", "--config.data.batch=3")
    assert unknown.returncode == 2
    assert "unknown key data.batch: did you mean data.batch_size?" in unknown.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config=configs/vit_from_scratch_512.py:foo"], "ValueError: unknown argument 'foo'"),
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--config=tests/configs/tiny.py", "--step=x"], "flag --step=x"),
        (["--config=tests/configs/tiny.py", "--steps=1"], "Unknown command line flag 'steps'"),
        (["--config=tests/configs/tiny.py", "--config.model.width=wide"], "expected a whole number, as in the file"),
    ],
)
def test_mistakes_on_the_command_line_end_with_a_message(tmp_path, words, message):
    command = [sys.executable, "-m", "vit_flax.data.show", "--out", tmp_path / "batch.png", *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4
