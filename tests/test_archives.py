import dataclasses
import errno
import gzip
import hashlib
import io
import re
import socket
import tarfile

import numpy as np
import pytest

from vit_flax.data import archives, datadir
from vit_flax.data.sources import make_source


def idx(array):
    """IDX: two zero bytes, the type (8: uint8), the number of axes, their big-endian lengths, the data."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pictures = {}
    for split, prefix, count in (("train", "train", 7), ("test", "t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        pictures[split] = images, labels
    return pictures


def write_cifar(path, files, names_file, names, label_bytes):
    """The binary version: label bytes, then the red, the green and the blue plane, row by row."""
    rng = np.random.default_rng(1)
    pictures = {}
    with tarfile.open(path, "w:gz") as tar:
        for file in files:
            images = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
            labels = rng.integers(0, len(names), (4, label_bytes), dtype=np.uint8)
            records = np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(4, -1)], axis=1)
            pictures[file] = images, labels[:, -1]
            add(tar, f"cifar/{file}", records.tobytes())
        add(tar, f"cifar/{names_file}", "\n".join(names).encode())
    return pictures


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def genuine(monkeypatch):
    """Declares the files of a folder to be the published ones."""

    def declare(name, folder):
        archive = archives.ARCHIVES[name]
        files = {file: (folder / file).read_bytes() for file in archive.files}
        sums = {file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()}
        monkeypatch.setitem(archives.ARCHIVES, name, dataclasses.replace(archive, files=sums))

    return declare


def assert_holds(source, images, labels):
    assert len(source) == len(images)
    for i in range(len(images)):
        np.testing.assert_array_equal(np.squeeze(source[i]["image"]), images[i])
        assert source[i]["label"] == labels[i]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(tmp_path, genuine, name):
    pictures = write_mnist(tmp_path / name)
    genuine(name, tmp_path / name)
    for split, (images, labels) in pictures.items():
        source = make_source(name=name, split=split, data_dir=tmp_path)
        assert_holds(source, images, labels)
        assert source[0]["image"].shape == (28, 28, 1)
    assert len(source.class_names) == 10
    assert len(make_source(name=name, split="train[:5]", data_dir=tmp_path)) == 5


def test_two_sets_with_the_same_file_names(tmp_path, genuine):
    digits, clothes = write_mnist(tmp_path / "downloads" / "manual", 0), write_mnist(tmp_path / "fashion_mnist", 1)
    genuine("mnist", tmp_path / "downloads" / "manual")
    genuine("fashion_mnist", tmp_path / "fashion_mnist")
    assert_holds(make_source(name="mnist", split="test", data_dir=tmp_path), *digits["test"])
    assert_holds(make_source(name="fashion_mnist", split="test", data_dir=tmp_path), *clothes["test"])


def test_cifar10(tmp_path, genuine):
    names = [f"class{i}" for i in range(10)]
    files = [f"data_batch_{i}.bin" for i in range(1, 6)]
    archive = tmp_path / "cifar-10-binary.tar.gz"
    pictures = write_cifar(archive, [*files, "test_batch.bin"], "batches.meta.txt", names, label_bytes=1)
    genuine("cifar10", tmp_path)
    train = make_source(name="cifar10", split="train", data_dir=tmp_path)
    assert_holds(train, *(np.concatenate(parts) for parts in zip(*(pictures[file] for file in files))))
    assert_holds(make_source(name="cifar10", split="test", data_dir=tmp_path), *pictures["test_batch.bin"])
    assert train.class_names == tuple(names)
    archive.unlink()
    assert_holds(make_source(name="cifar10", split="test", data_dir=tmp_path), *pictures["test_batch.bin"])


def test_cifar100_has_fine_labels(tmp_path, genuine):
    names = [f"class{i}" for i in range(100)]
    archive = tmp_path / "cifar-100-binary.tar.gz"
    pictures = write_cifar(archive, ["train.bin", "test.bin"], "fine_label_names.txt", names, label_bytes=2)
    genuine("cifar100", tmp_path)
    assert_holds(make_source(name="cifar100", split="train", data_dir=tmp_path), *pictures["train.bin"])


def test_an_absent_archive_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        make_source(name="cifar10", split="train", data_dir=tmp_path, download=False)
    message = str(error.value)
    assert "cifar-10-binary.tar.gz (170,052,171 bytes)" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in message
    assert str(tmp_path / "cifar10") in message
    assert "server" not in message


def test_all_absent_files_are_asked_for_at_once(tmp_path, genuine):
    write_mnist(tmp_path / "mnist")
    genuine("mnist", tmp_path / "mnist")
    for file in ("train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (tmp_path / "mnist" / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels.*, t10k-images.*put them into") as error:
        make_source(name="mnist", split="train", data_dir=tmp_path, download=False)
    assert "train-images" not in str(error.value)


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the call, and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setitem(archives.ARCHIVES, "mnist", dataclasses.replace(archives.ARCHIVES["mnist"], url=url))
        with pytest.raises(FileNotFoundError, match=f"train-images-idx3-ubyte.gz .*{url}.*download=True waits longer"):
            make_source(name="mnist", split="train", data_dir=tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"cifar10/cifar-10-binary.tar.gz is damaged.*c4a38c50"):
        make_source(name="cifar10", split="train", data_dir=tmp_path)


def test_a_read_only_data_dir_is_parsed_each_time(tmp_path, genuine, monkeypatch, caplog):
    pictures = write_mnist(tmp_path / "mnist")
    genuine("mnist", tmp_path / "mnist")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(datadir.tempfile, "mkdtemp", refuse)
    assert_holds(make_source(name="mnist", split="test", data_dir=tmp_path), *pictures["test"])
    assert re.search(r"cannot write data below .*Read-only.*; parsing mnist again in every run", caplog.text)


@pytest.mark.parametrize("download", [True, None])
@pytest.mark.parametrize("content", ["genuine", "other"])
def test_download(tmp_path, genuine, monkeypatch, content, download):
    elsewhere = tmp_path / "elsewhere"
    pictures = write_mnist(elsewhere)
    genuine("mnist", elsewhere)
    if content == "other":
        write_mnist(elsewhere, seed=5)
    # A file: address stands for the network.
    archive = dataclasses.replace(archives.ARCHIVES["mnist"], url=elsewhere.as_uri())
    monkeypatch.setitem(archives.ARCHIVES, "mnist", archive)
    arguments = {"name": "mnist", "split": "test", "data_dir": tmp_path / "data", "download": download}
    if content == "other":
        with pytest.raises(ValueError, match="gave another file"):
            make_source(**arguments)
        assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    else:
        assert_holds(make_source(**arguments), *pictures["test"])


def test_download_without_network(tmp_path, monkeypatch):
    archive = dataclasses.replace(archives.ARCHIVES["mnist"], url=(tmp_path / "nowhere").as_uri())
    monkeypatch.setitem(archives.ARCHIVES, "mnist", archive)
    with pytest.raises(FileNotFoundError, match=re.escape(f"put it into {tmp_path / 'data' / 'mnist'}")):
        make_source(name="mnist", split="test", data_dir=tmp_path / "data", download=True)
