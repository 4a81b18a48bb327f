"""Hugging Face data sets, made on the spot; nothing is downloaded."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vit_flax.data.check import check
from vit_flax.data.pipeline import eval_batches
from vit_flax.data.sources import Source, make_source
from vit_flax.data.transforms import make_transform

datasets = pytest.importorskip("datasets")


def png(shade):
    data = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), shade, np.uint8)).save(data, "PNG")
    return data.getvalue()


def table(labels, feature):
    images = [{"bytes": png(shade), "path": None} for shade in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A set with two splits, as `save_to_disk` writes it."""
    folder = tmp_path_factory.mktemp("hf") / "pets"
    names = datasets.ClassLabel(names=["cat", "dog"])
    datasets.DatasetDict(train=table([0, 1, 1], names), test=table([1, 0], names)).save_to_disk(str(folder))
    return folder


def test_a_saved_set(saved):
    train, test = (make_source(name="hf", dataset=str(saved), split=split) for split in ("train", "test"))
    assert isinstance(train, Source)
    assert (len(train), len(test), train.class_names) == (3, 2, ("cat", "dog"))
    assert train[2] == {"image": png(2), "label": 1, "id": f"{saved}:train[2]"}
    first, again = (make_source(name="hf", dataset=str(saved), split="train").fingerprint() for _ in range(2))
    assert json.loads(json.dumps(first)) == again
    assert first != test.fingerprint()
    assert pickle.loads(pickle.dumps(train))[1] == train[1]  # on its way to the worker processes


def test_batches(saved):
    source = make_source(name="hf", dataset=str(saved), split="train")
    (batch,) = eval_batches(source, transform=make_transform([]), batch_size=4)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 0]
    assert batch["label"].tolist() == [0, 1, 1, 0]
    assert batch["mask"].tolist() == [True, True, True, False]


def test_one_split_and_labels_as_text(tmp_path):
    table(["dog", "cat"], datasets.Value("string")).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"give class_names=\[...\]"):
        make_source(name="hf", dataset=str(tmp_path), split="train")
    source = make_source(name="hf", dataset=str(tmp_path), split="train", class_names=["cat", "dog"])
    assert [source[i]["label"] for i in range(2)] == [1, 0]
    wrong = make_source(name="hf", dataset=str(tmp_path), split="train", class_names=["cat", "emu"])
    with pytest.raises(ValueError, match=r"\[0\] has the label 'dog', which is none of"):
        wrong[0]


def test_rows_without_a_picture_or_a_label_are_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": png(0), "path": None}, None]
    datasets.Dataset.from_dict({"image": images, "label": [None, 1]}, features=features).save_to_disk(str(tmp_path))
    (*_, report) = check(make_source(name="hf", dataset=str(tmp_path), split="train"))
    assert report.problems == [
        f"{tmp_path}:train[0]: expected a whole number as label, found None",
        f"cannot decode '{tmp_path}:train[1]': the column 'image' is empty in this row",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, r"no split 'val' in .*\['test', 'train'\]"),
        ({"image_key": "img"}, r"no column 'img'; it has \['image', 'label'\]"),
        ({"image_key": "label"}, "expected images"),
    ],
)
def test_mistakes(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_source(**{"name": "hf", "dataset": str(saved), "split": "train", **arguments})


def test_a_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        make_source(name="hf", dataset=str(tmp_path / "nowhere"), split="train")
