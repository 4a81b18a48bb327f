import gzip
import json
import re
import struct

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from vit_flax.data import tfrecord
from vit_flax.data.digits import prepare_digits
from vit_flax.data.sources import make_source


def write_tfrecord(path, records):
    """Length, checksum of it, data, checksum of it; nobody reads the checksums."""
    path.write_bytes(b"".join(struct.pack("<QI", len(data), 0) + data + struct.pack("<I", 0) for data in records))


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    """The digits as TFDS would have prepared them with TensorFlow."""
    prepared = prepare_digits(tmp_path_factory.mktemp("prepared"))
    directory = tmp_path_factory.mktemp("tfrecord")
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for file in prepared.iterdir():
        if file.suffix in (".json", ".txt"):
            (directory / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for split in ("train", "test"):
        data = tfds.builder_from_directory(prepared).as_data_source(split, deserialize_method=raw)
        write_tfrecord(directory / f"digits-{split}.tfrecord-00000-of-00001", [data[i] for i in range(len(data))])
    return directory


def test_a_tfds_set(tfds_directory, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"vit_flax.data.tfrecord"):
        make_source(name="tfds", directory=tfds_directory, split="train")
    assert tfrecord.main([str(tfds_directory), "--out", str(tmp_path / "out")]) == 0
    assert f'directory="{tmp_path / "out"}"' in capsys.readouterr().out
    converted = make_source(name="tfds", directory=tmp_path / "out", split="train[:50]")
    original = make_source(name="digits", split="train[:50]", data_dir=tfds_directory / "again")
    for i in range(50):
        assert converted[i]["image"] == original[i]["image"]
        assert converted[i]["label"] == original[i]["label"]
    assert len(make_source(name="tfds", directory=tmp_path / "out", split="test")) == 359


def test_a_shard_that_lost_records(tfds_directory, tmp_path):
    for file in tfds_directory.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "digits-test.tfrecord-00000-of-00001"
    write_tfrecord(shard, list(tfrecord.read_tfrecord(shard))[:-1])
    with pytest.raises(ValueError, match=r"1796 records, dataset_info.json says 1797"):
        tfrecord.convert_tfds(tmp_path, tmp_path / "out")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"digits-test.tfrecord-00000-of-00001 ends early"):
        tfrecord.convert_tfds(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def example(image, label, **more):
    proto = tf_example_pb2.Example()
    proto.features.feature["image/encoded"].bytes_list.value.append(image)
    proto.features.feature["image/class/label"].int64_list.value.append(label)
    for key, value in more.items():
        proto.features.feature[key].bytes_list.value.append(value)
    return proto.SerializeToString()


def test_tf_examples(tmp_path):
    write_tfrecord(tmp_path / "train-0", [example(b"a", 1), example(b"b", 2, text=b"x")])
    write_tfrecord(tmp_path / "train-1", [example(b"c", 1)])
    write_tfrecord(tmp_path / "val-0", [example(b"d", 2)])
    (tmp_path / "names.txt").write_text("\ufeffcat\r\ndog\r\n\r\n", encoding="utf-8")  # as Windows leaves it
    words = [f"train={tmp_path}/train-*", f"val={tmp_path}/val-*", "--out", str(tmp_path / "out"), "--label_offset=-1"]
    assert tfrecord.main([*words, "--class_names", str(tmp_path / "names.txt")]) == 0
    train, val = (make_source(name="records", directory=tmp_path / "out", split=split) for split in ("train", "val"))
    assert train.class_names == ("cat", "dog")
    assert [(train[i]["image"], train[i]["label"]) for i in range(3)] == [(b"a", 0), (b"b", 1), (b"c", 0)]
    assert train[2]["id"] == f"{tmp_path}/train-1[0]"
    assert len(val) == 1


def test_an_equals_sign_in_a_path(tmp_path):
    folder = tmp_path / "day=1"
    folder.mkdir()
    for name in ("a", "b"):
        write_tfrecord(folder / name, [example(b"x", 0)])
    (tmp_path / "names.txt").write_text("cat\n")
    words = [f"train={folder}/a", f"{folder}/b", "--out", str(tmp_path / "out")]
    assert tfrecord.main([*words, "--class_names", str(tmp_path / "names.txt")]) == 0
    assert len(make_source(name="records", directory=tmp_path / "out", split="train")) == 2


def test_an_earlier_conversion_is_not_taken_for_this_one(tmp_path, capsys):
    write_tfrecord(tmp_path / "train-0", [example(b"a", 1)])
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    words = [f"train={tmp_path}/train-0", "--out", str(tmp_path / "out"), "--class_names", str(tmp_path / "names.txt")]
    assert tfrecord.main(words) == 0
    assert tfrecord.main([*words, "--label_offset=-1"]) == 2
    assert "holds something already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (example(b"a", 3), r"train-0\[0\]: label 3 is outside 0..2"),
        (example(b"a", -1), r"train-0\[0\]: label -1 is outside 0..2"),
        (tf_example_pb2.Example().SerializeToString(), r"train-0\[0\] has no feature 'image/encoded'"),
    ],
    ids=["label too large", "label negative", "no image"],  # the records' own bytes differ from process to process
)
def test_bad_tf_examples(tmp_path, capsys, record, message):
    write_tfrecord(tmp_path / "train-0", [record])
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    words = [f"train={tmp_path}/train-0", "--out", str(tmp_path / "out"), "--class_names", str(tmp_path / "names.txt")]
    assert tfrecord.main(words) == 2

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"x" * 100), "train-0 is compressed: gunzip it first"),
        (b"some text that somebody took for records" * 3, "train-0 ends early or is no TFRecord file"),
        (struct.pack("<QI", 3, 0) + b"abc" + bytes(4), r"train-0\[0\] is no tf.train.Example"),
        (b"", "the files of 'train' hold no record: .*train-0"),
    ],
    ids=["compressed", "text", "other records", "empty"],
)
def test_files_that_hold_no_examples(tmp_path, capsys, data, message):
    (tmp_path / "train-0").write_bytes(data)
    (tmp_path / "names.txt").write_text("a\n")
    words = [f"train={tmp_path}/train-0", "--out", str(tmp_path / "out"), "--class_names", str(tmp_path / "names.txt")]
    assert tfrecord.main(words) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", ""))
    assert not (tmp_path / "out").exists()


def test_bad_command_lines(tmp_path, capsys):
    assert tfrecord.main([str(tmp_path / "nowhere"), "--out", "x"]) == 2
    assert "expected a data set that TFDS prepared" in capsys.readouterr().err
    assert tfrecord.main(["train=nowhere-*", "--out", "x"]) == 2
    assert "at least one file" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    words = [f"train={tmp_path}/names.txt", "--out", "x", "--class_names", str(tmp_path / "names.txt")]
    assert tfrecord.main(words) == 2
    assert "names.txt has a line without a name" in capsys.readouterr().err


def test_info_is_kept(tfds_directory, tmp_path):
    tfrecord.convert_tfds(tfds_directory, tmp_path / "out")
    before, after = (
        json.loads((folder / "dataset_info.json").read_text()) for folder in (tfds_directory, tmp_path / "out")
    )
    assert {key for key in after if after[key] != before.get(key)} == {"fileFormat"}
