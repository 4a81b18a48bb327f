import hashlib
import json
import types

import numpy as np
import pytest

from vit_flax.data import huggingface
from vit_flax.data.sources import SOURCES, Source, make_source, parse_source


def small_arrays(num_examples=6, num_classes=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, 5, 4, 3), dtype=np.uint8)
    return images, np.arange(num_examples) % num_classes


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        make_source(name="digit", split="train")


def test_a_source_on_a_command_line():
    words = ["folder", "root=2012", "held_out_percent=20", "class_names=['a', 'b']"]
    expected = {"name": "folder", "root": "2012", "held_out_percent": 20, "class_names": ["a", "b"]}
    assert parse_source(words) == expected


@pytest.mark.parametrize("kind", ["memory", "npz", "npy"])
def test_arrays(tmp_path, kind):
    images, labels = small_arrays()
    if kind == "memory":
        where = {"arrays": {"train": (images, labels)}}
    elif kind == "npz":
        np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels)
        where = {"path": tmp_path / "set.npz"}
    else:
        np.save(tmp_path / "train_images.npy", images)
        np.save(tmp_path / "train_labels.npy", labels)
        where = {"path": tmp_path}
    source = make_source(name="arrays", split="train", **where)
    assert isinstance(source, Source)
    assert len(source) == 6
    assert source.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(source[4]["image"], images[4])
    assert source[4]["label"] == 1
    assert source[4]["id"] == "arrays:train[4]"
    assert repr(source) == repr(make_source(name="arrays", split="train", **where))
    assert json.loads(json.dumps(source.fingerprint())) == {
        "name": "arrays",
        "split": "train",
        "num_examples": 6,
        "class_names": ["0", "1", "2"],
        "digest": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()[:16],
    }


def test_arrays_never_unpickle(tmp_path):
    np.savez(tmp_path / "evil.npz", train_images=np.array([{}], dtype=object), train_labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="allow_pickle"):
        make_source(name="arrays", split="train", path=tmp_path / "evil.npz")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.float32), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4), np.uint8), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2), "integer labels"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(3, int), "integer labels"),
        (
            np.zeros((2, 4, 4), np.uint8),
            np.zeros((2, 1), int),
            r"zeros and ones \[n, v\] for 2 images, found int64 \(2, 1",
        ),
        (np.zeros((0, 4, 4), np.uint8), np.zeros(0, int), "empty"),
    ],
)
def test_arrays_of_the_wrong_kind(images, labels, message):
    with pytest.raises(ValueError, match=message):
        make_source(name="arrays", split="train", arrays={"train": (images, labels)})


def test_damaged_files_of_arrays_are_named(tmp_path):
    images, labels = small_arrays()
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels)
    data = (tmp_path / "set.npz").read_bytes()
    for damaged in (b"", b"hello", data[:-50], data.replace(images.tobytes()[:50], bytes(50))):
        (tmp_path / "set.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read arrays from .*set.npz: "):
            make_source(name="arrays", path=tmp_path / "set.npz", split="train")


def test_missing_split_says_what_there_is():
    with pytest.raises(ValueError, match=r"'test'.*\['train'\]"):
        make_source(name="arrays", split="test", arrays={"train": small_arrays()})


def test_tfds_set_that_is_not_prepared_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tfds build cifar10 --file_format=array_record --data_dir=/"):
        make_source(name="tfds", split="train", dataset="cifar10", data_dir=tmp_path)


def test_tfds_unknown_name():
    with pytest.raises(ValueError, match="knows no data set 'cifar11'"):
        make_source(name="tfds", split="train", dataset="cifar11")


def test_tfds_unknown_split(tmp_path):
    with pytest.raises(ValueError, match=r"split 'val'.*train, test"):
        make_source(name="digits", split="val", data_dir=tmp_path)


def test_a_hugging_face_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").mkdir()
    library = types.SimpleNamespace(load_dataset=lambda name, *_, **__: name)
    opened = [huggingface._open(library, name, "train", None, None) for name in ("~/pets", "user/name")]
    assert opened == [str(tmp_path / "pets"), "user/name"]


def test_every_source_is_documented():
    assert all(source.__doc__ for source in SOURCES.values())
