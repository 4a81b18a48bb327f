"""Remote addresses, with an in-memory file system and a stand-in for the hub; nothing here touches a network."""

import gc
import json
import sys
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest

from vit_flax import load_pretrained, save_pretrained
from vit_flax.convert import remote

CHECKPOINT = Path(__file__).parent / "golden" / "vit_jax_prelinen.ckpt.npz"


def put(path, *, at):
    files = fsspec.filesystem("memory")
    files.makedirs(at, exist_ok=True)
    for file in path.iterdir() if path.is_dir() else [path]:
        files.pipe_file(f"{at}/{file.name}", file.read_bytes())


def test_file_and_folder_are_fetched_loaded_and_removed(tmp_path):
    put(CHECKPOINT, at="/bucket")
    local = load_pretrained(CHECKPOINT)
    one = load_pretrained("memory://bucket/vit_jax_prelinen.ckpt.npz")
    np.testing.assert_array_equal(one.params["head"]["kernel"], local.params["head"]["kernel"])
    assert one.report.path == "memory://bucket/vit_jax_prelinen.ckpt.npz"

    save_pretrained(tmp_path / "own", local.model, local.params, family="vit_flax")
    (tmp_path / "own" / "optimizer.bin").write_bytes(b"large")
    put(tmp_path / "own", at="/bucket/own")
    fetched = remote.fetch("memory://bucket/own")
    assert sorted(file.name for file in Path(fetched.path).iterdir()) == ["config.json", "model.safetensors"]
    where = Path(fetched.path)
    assert load_pretrained("memory://bucket/own").report.family == "vit_flax"
    del fetched
    gc.collect()
    assert not where.exists()


def test_a_file_comes_with_what_is_needed_to_read_it(tmp_path):
    save_pretrained(tmp_path / "own", *_model(), family="vit_flax")
    (tmp_path / "own" / "other.safetensors").write_bytes(b"large")
    put(tmp_path / "own", at="/bucket/two")
    fetched = remote.fetch("memory://bucket/two/model.safetensors", beside=["config.json", "none.json"])
    assert sorted(file.name for file in Path(fetched.path).parent.iterdir()) == ["config.json", "model.safetensors"]
    assert load_pretrained("memory://bucket/two/model.safetensors").report.family == "vit_flax"

    index = {"weight_map": {"a": "sub/1.safetensors", "b": "2.safetensors", "c": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    put(tmp_path / "model.safetensors.index.json", at="/bucket/two")
    for name in ("two/sub/1.safetensors", "two/2.safetensors", "outside.safetensors"):
        fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", b"")
    fetched = remote.fetch("memory://bucket/two/model.safetensors.index.json")
    folder = Path(fetched.path).parent
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        "model.safetensors.index.json",
        "sub/1.safetensors",
        "2.safetensors",
    }


def test_a_server_that_forbids_to_ask_for_more_gives_the_file(tmp_path, monkeypatch):
    put(CHECKPOINT, at="/bucket")
    get = type(fsspec.filesystem("memory")).get_file

    def only_weights(self, path, *rest, **options):
        if path.endswith(".json"):
            raise PermissionError("403")
        return get(self, path, *rest, **options)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", only_weights)
    save_pretrained(tmp_path / "own", *_model(), family="npz")
    assert load_pretrained("memory://bucket/vit_jax_prelinen.ckpt.npz").report.loaded
    put(tmp_path / "own" / "model.npz", at="/bucket/three")
    fsspec.filesystem("memory").pipe_file("/bucket/three/x.safetensors", b"")
    assert Path(remote.fetch("memory://bucket/three/x.safetensors", beside=["config.json"]).path).exists()


def test_nothing_at_the_address():
    with pytest.raises(FileNotFoundError, match="memory://bucket/none: there is no such file or folder"):
        load_pretrained("memory://bucket/none")


def test_hub_addresses_name_repository_revision_and_file(monkeypatch, tmp_path):
    calls = []
    save_pretrained(tmp_path / "own", *_model(), family="vit_flax")

    def download(repository, **arguments):
        calls.append((repository, arguments["revision"], arguments["allow_patterns"]))
        return str(tmp_path / "own")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    for address in ("hf://owner/name", "hf://owner/name/model.safetensors"):
        assert load_pretrained(address).report.path == address
    for file in ("sub/a.safetensors",):
        with pytest.raises(FileNotFoundError, match=f"hf://owner/name@v2/{file}: there is no such file in the repos"):
            remote.fetch(f"hf://owner/name@v2/{file}", beside=["config.json"])
    index = {"weight_map": {"a": "1.safetensors", "b": "sub/2.safetensors"}}
    (tmp_path / "own" / "model.safetensors.index.json").write_text(json.dumps(index))
    remote.fetch("hf://owner/name/model.safetensors.index.json")
    configs = ["config.json", "preprocessor_config.json", "processor_config.json"]
    assert calls == [
        ("owner/name", None, ["*.json", "*.safetensors", "*.npz"]),
        ("owner/name", None, ["model.safetensors", *configs]),
        ("owner/name", "v2", ["sub/a.safetensors", "sub/config.json"]),
        ("owner/name", None, ["model.safetensors.index.json"]),
        ("owner/name", None, ["1.safetensors", "sub/2.safetensors"]),
    ]


def _model():
    loaded = load_pretrained(CHECKPOINT)
    return loaded.model, loaded.params


@pytest.mark.parametrize(
    ("address", "package"), [("hf://owner/name", "huggingface_hub"), ("gs://bucket/file.npz", "fsspec")]
)
def test_package_that_is_missing_is_named(address, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"{address}: needs the package {package}: pip install {package}"):
        load_pretrained(address)


def test_file_system_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ModuleNotFoundError, match=r"gs://bucket/file\.npz: .*gcsfs"):
        load_pretrained("gs://bucket/file.npz")
    with pytest.raises(OSError, match=r"nope://x: could not be fetched .*nope"):
        load_pretrained("nope://x")


def test_what_the_hub_refuses_is_an_error_with_the_address(monkeypatch):
    class Gated(Exception):
        pass

    def refuse(*_, **__):
        raise Gated("401: access to this repository is restricted.\nmore")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(OSError, match=r"hf://a/b: could not be fetched \(Gated: 401: access to this .* restricted\.\)"):
        load_pretrained("hf://a/b")
