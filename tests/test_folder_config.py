"""`configs/folder.py`, the config for a folder of one's own pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import folder
from vit_flax import train
from vit_flax.checkpoint_record import steps_in
from vit_flax.config import ConfigError
from vit_flax.data.pipeline import Order
from vit_flax.job import build
from vit_flax.trainer import evaluate


def fill(root, classes, num_pictures):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(num_pictures):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(root / name / f"{i}.jpg")
    return root


def shrunk(root):
    """The config with a model and images that compile in a second."""
    config = folder.get_config(str(root))
    del config.model["variant"]
    config.model.update(dict(patch_size=16, width=8, depth=1, mlp_dim=16, num_heads=2))
    config.data.update(dict(batch_size=8, eval_batch_size=8, num_threads=1))
    for op in (*config.data.train_transforms, *config.data.eval_transforms):
        if "size_px" in op:
            op["size_px"] = 32
    config.run.update(dict(total_epochs=1.0, log_every_steps=1))
    config.optim.warmup_epochs = 0.0
    return config


@pytest.mark.parametrize(
    ("layout", "eval_split"), [(["."], "val"), (["train", "val"], "val"), (["train", "test"], "test")]
)
def test_the_layouts_of_a_folder(tmp_path, layout, eval_split):
    for split in layout:
        fill(tmp_path / split, ["cat", "dog", "emu"], 30)
    (tmp_path / layout[0] / ".cache").mkdir()
    config = folder.get_config(str(tmp_path))
    assert (config.model.num_classes, config.data.eval_split) == (3, eval_split)
    job = build(shrunk(tmp_path))
    assert job.data.class_names == ("cat", "dog", "emu")
    assert job.data.image_shape == (32, 32, 3)


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ["train", "plane"], 40)
    config = folder.get_config(str(tmp_path))
    assert (config.model.num_classes, config.data.eval_split) == (2, "val")
    assert build(shrunk(tmp_path)).data.class_names == ("plane", "train")


def test_trains_and_evaluates_and_counts_what_it_skips(tmp_path, caplog):
    pictures = fill(tmp_path / "pictures", ["cat", "dog"], 40)
    data = build(shrunk(pictures)).data
    for source in (data.train_source, data.eval_source):
        Path(source[3]["id"]).write_bytes(b"")
    config = shrunk(pictures)
    config.data.on_error = "skip"
    _, results = train(config, tmp_path / "run")
    assert results["val/count"] == len(data.eval_source) - 1 > 0
    assert np.isfinite(results["train/loss"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["train/skipped_records"] for line in lines if "train/loss" in line]
    assert sum(skipped) == 1  # one step a line, one epoch
    assert caplog.text.count("the file is empty") >= 2
    assert "1 of" in caplog.text


def test_a_run_that_met_a_bad_picture_goes_on_as_its_message_says(tmp_path):
    config = shrunk(fill(tmp_path / "pictures", ["cat", "dog"], 40))
    config.data.decode_once = False  # not all at the start
    source = build(config).data.train_source
    order = Order(len(source), int(np.random.SeedSequence(0).generate_state(2)[0]))
    in_fourth_batch = order(np.arange(24, 32)).max()
    Path(source[int(in_fourth_batch)]["id"]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"the file is empty .*data\.on_error='skip' goes on without them"):
        train(config, tmp_path / "run")
    assert steps_in(tmp_path / "run" / "checkpoints") == [3]
    config.data.on_error = "skip"
    state, _ = train(config, tmp_path / "run")
    assert int(state.step) == build(config).run.total_steps


def test_what_is_evaluated_has_the_classes_that_were_trained(tmp_path):
    pictures = fill(tmp_path / "pictures", ["cat", "dog"], 40)
    _, results = train(shrunk(pictures), tmp_path / "run")
    for i in range(40, 60):
        shutil.copy(pictures / "cat" / "0.jpg", pictures / "cat" / f"{i}.jpg")
    more = evaluate(shrunk(pictures), tmp_path / "run")  # other pictures: fine
    assert more["val/count"] > results["val/count"]
    (pictures / "cat").rename(pictures / "ewe")
    with pytest.raises(
        ConfigError, match=r"other classes than the data: 'cat' was where 'dog' is \(2 differ\)\. Put the data back"
    ):
        evaluate(shrunk(pictures), tmp_path / "run")


def test_a_folder_that_is_not_there():
    with pytest.raises(ConfigError, match="/nowhere, found nothing"):
        build(folder.get_config("/nowhere"))
