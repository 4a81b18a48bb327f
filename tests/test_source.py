"""Files of weights as they come: whole, in shards, damaged, or something else. Errors name file, key and remedy."""

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vit_flax.convert.source import open_source, read_npz, weight_files


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {"first.weight": rng.standard_normal((3, 4), np.float32), "second": np.arange(6, dtype=np.float16)}


@pytest.fixture
def safetensors(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def with_header(path, change):
    """Rewrites the header of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(change(json.loads(raw[8:end]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def test_every_format_gives_the_same_tensors(weights, safetensors, tmp_path):
    np.savez(tmp_path / "plain.npz", **weights)
    np.savez_compressed(tmp_path / "packed.npz", **weights)
    shards = tmp_path / "shards"
    shards.mkdir()
    files = {name: f"model-{i}-of-2.safetensors" for i, name in enumerate(weights, start=1)}
    for name, file in files.items():
        save_file({name: weights[name]}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for path in (safetensors, tmp_path / "plain.npz", tmp_path / "packed.npz", shards):
        source = open_source(path)
        assert set(source.tensors) == set(weights)
        for name, expected in weights.items():
            tensor = source.tensors[name]
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_array_equal(tensor.read(), expected)
    assert [file.name for file in weight_files(shards)] == list(files.values())


def test_bfloat16_survives_both_formats(tmp_path):
    value = np.arange(5).astype(ml_dtypes.bfloat16)
    save_file({"a": value}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", a=value)
    for name in ("a.safetensors", "a.npz"):
        read = open_source(tmp_path / name).tensors["a"].read()
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read, value)


def test_configuration_beside_the_weights_is_read(safetensors):
    (safetensors.parent / "config.json").write_text('{"model_type": "vit"}')
    (safetensors.parent / "preprocessor_config.json").write_text('{"size": 224}')
    source = open_source(safetensors.parent)
    assert (source.config, source.preprocessor) == ({"model_type": "vit"}, {"size": 224})
    (safetensors.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON .*Fetch the file again"):
        open_source(safetensors.parent)
    (safetensors.parent / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, found a list"):
        open_source(safetensors.parent)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_errors(part, weights, safetensors, tmp_path):
    np.savez(tmp_path / "a.npz", **weights)
    for path in (safetensors, tmp_path / "a.npz"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=rf"{path.name}: truncated.*Fetch it again"):
            open_source(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: [h], "is no JSON object"),
        (lambda h: {**h, "second": None}, r"'second' is described as None; expected a dtype out of F64, F32"),
        (lambda h: {**h, "second": {**h["second"], "dtype": "F8"}}, "'second' is described as .*'F8'"),
        (lambda h: {**h, "second": {**h["second"], "shape": [7]}}, "'second' has 12 bytes, not those of float16"),
        (lambda h: {**h, "second": {**h["second"], "data_offsets": [-8, 4]}}, "'second' should be in bytes"),
        (lambda h: {**h, "second": {**h["second"], "data_offsets": [0, 10**9]}}, "'second' should be in bytes"),
        (lambda h: {**h, "second": {**h["second"], "data_offsets": [9]}}, "'second' is described as"),
    ],
)
def test_headers_that_lie_are_errors(change, message, safetensors):
    with_header(safetensors, change)
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors.*{message}"):
        open_source(safetensors)


class Bomb:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


def test_pickled_arrays_are_refused_and_never_unpickled(tmp_path):
    trace = tmp_path / "unpickled"
    bomb = np.empty((), object)
    bomb[()] = Bomb(trace)
    np.savez(tmp_path / "a.npz", good=np.zeros(3), bad=bomb)
    with pytest.raises(ValueError, match=r"a\.npz: 'bad' is a pickled Python object.*numpy\.savez"):
        open_source(tmp_path / "a.npz")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "pytorch_model.bin", "last.ckpt"])
def test_pickled_pytorch_files_get_the_command_that_converts_them(name, tmp_path):
    trace = tmp_path / "unpickled"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(
        ValueError, match=rf"(?s){name}: pickled PyTorch files.*python -c \"import torch.*{name}"
    ) as error:
        open_source(tmp_path / name)
    assert not trace.exists()
    command = str(error.value).partition('python -c "')[2].partition('"')[0]
    compile(command, "the command", "exec")


@pytest.mark.parametrize("name", [".", "pytorch_model.bin.index.json"])
def test_pickled_shards_get_one_command_for_all(name, tmp_path):
    files = {"a": "pytorch_model-1-of-2.bin", "b": "pytorch_model-2-of-2.bin"}
    for file in files.values():
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(
        ValueError, match=r"(?s)index\.json: pickled PyTorch files.*1-of-2.*2-of-2.*/model\.safetensors"
    ):
        open_source(tmp_path / name)


def test_folders_that_leave_open_what_is_meant(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"the folder holds no weights; expected model\.safetensors"):
        open_source(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(f"For a run of ours give its own folder, {tmp_path / 'run'}.")):
        open_source(tmp_path / "run" / "checkpoints")
    np.savez(tmp_path / "a.npz", **weights)
    np.savez(tmp_path / "b.npz", **weights)
    with pytest.raises(ValueError, match=r"which of these files is meant: a\.npz, b\.npz\? Give the path of one"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected an \.npz or \.safetensors file.*'notes\.txt'"):
        open_source(tmp_path / "notes.txt")


def test_shards_that_are_missing(weights, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"first.weight": "1.safetensors", "second": "2.safetensors"}}))
    save_file({"first.weight": weights["first.weight"]}, tmp_path / "1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"the shard '2\.safetensors' is missing"):
        open_source(tmp_path)
    save_file({"other": weights["second"]}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match="'second' is not in the shard that the index names"):
        open_source(tmp_path)
    for outside in ("../1.safetensors", str(tmp_path / "1.safetensors")):
        index.write_text(json.dumps({"weight_map": {"first.weight": outside}}))
        for read in (open_source, weight_files):
            with pytest.raises(ValueError, match=r"1\.safetensors' is not below the folder of the index"):
                read(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: expected a table 'weight_map'"):
        open_source(tmp_path)
    (tmp_path / "1.safetensors").rename(first := tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"00002\.safetensors: one shard of several\. Give the folder"):
        open_source(first)


def test_name_of_a_repository_without_its_scheme():
    with pytest.raises(
        FileNotFoundError, match=r"no such file or folder\. If it is a repository.*: hf://owner/vit-base\."
    ):
        open_source("owner/vit-base")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder\.$"):
        open_source("tests/vit-base")


def test_name_of_a_checkpoint_that_no_run_has(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"no such file or folder\. Of a run there are {tmp_path}, {tmp_path}:best"
    ):
        open_source(f"{tmp_path}:last")


def test_several_threads_read_one_archive(tmp_path):
    """One `zipfile.ZipFile` for all of them fails on Python 3.13.0, most of the times."""
    arrays = {f"block_{i}/kernel": np.full((64, 64), i, np.float32) for i in range(200)}
    np.savez(tmp_path / "many.npz", **arrays)
    tensors = read_npz(tmp_path / "many.npz")
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            read = dict(zip(tensors, pool.map(lambda tensor: tensor.read(), tensors.values())))
        assert all((read[key] == array).all() for key, array in arrays.items())
