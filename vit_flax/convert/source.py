"""Files of weights, opened but not yet read: names, shapes and types first, bytes when a tensor is asked for.

source = open_source("deit_small/")          # a folder, a .safetensors file, an index of shards, or an .npz
source.tensors["cls_token"].shape            # known from the header
source.tensors["cls_token"].read()           # a view of the file's pages, or a decompressed member
"""

import json
import math
import re
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vit_flax.convert.remote import fetch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

DTYPES = {  # the names of the safetensors format
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Tensor:
    """One stored array.

    Attributes:
      key: its name in the file.
      shape: as stored.
      dtype: as stored.
      read: gives the array; it must not be written to.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Source:
    """Weights and what lies beside them.

    Attributes:
      path: for messages.
      tensors: by name.
      config: the contents of config.json; empty if there is none.
      preprocessor: the contents of preprocessor_config.json, or of the image processor in processor_config.json; empty
        if there is none.
      keep_alive: whatever must live as long as the tensors can be read (a temporary folder).
    """

    path: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: Any = None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there.

        Raises: ValueError: it is not; names the file and the key.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: there is no tensor {name!r}, which every file of this family has.")
        return self.tensors[name].shape

    def depth(self, pattern: str) -> int:
        """The number of blocks: one more than the largest index at `{i}` in `pattern` among the names."""
        regex = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
        return 1 + max((int(m[1]) for m in map(regex.match, self.tensors) if m), default=-1)


def open_source(path: str | Path) -> Source:
    """Opens a file or folder of weights without reading the tensors.

    Args:
      path: an .npz file, a .safetensors file, an index of shards (.safetensors.index.json), or a folder that holds one
        of them with its config.json, or the workdir of a run of ours (see `workdir`). An address with a scheme
        (hf://owner/name, gs://bucket/folder) is fetched first.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is truncated, pickled or of another format; the message names the file and the remedy.
    """
    if "://" in str(path):
        folder = fetch(str(path), beside=(CONFIG, PREPROCESSOR, PROCESSOR))
        return _open_local(Path(folder.path), name=str(path), keep_alive=folder)
    from vit_flax.convert.workdir import is_workdir, open_workdir

    local = Path(path).expanduser()
    if is_workdir(str(local)):
        return open_workdir(str(local))
    return _open_local(local, name=str(path), keep_alive=None)


def _open_local(path: Path, *, name: str, keep_alive: Any) -> Source:
    if not path.exists():
        on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.exists()
        hint = f" If it is a repository of the Hugging Face hub: hf://{name}." if on_hub else ""
        if (run := path.with_name(path.name.partition(":")[0])) != path and run.is_dir():
            hint = f" Of a run there are {run}, {run}:best, {run}:ema, {run}:best:ema and {run}/checkpoints/<step>."
        raise FileNotFoundError(f"{name}: there is no such file or folder.{hint}")
    file = _find_weights(path, name) if path.is_dir() else path
    if file.suffix in _PICKLED:
        raise _pickled(file, [file], file.with_suffix(".safetensors"))
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name):
        raise ValueError(
            f"{file}: one shard of several. Give the folder, or the index beside it ({WEIGHTS}.index.json)."
        )
    if file.name.endswith(".index.json"):
        tensors = _read_shards(file)
    elif file.suffix == ".safetensors":
        tensors = read_safetensors(file)
    elif file.suffix == ".npz":
        return Source(name, read_npz(file), keep_alive=keep_alive)
    else:
        raise ValueError(f"{name}: expected an .npz or .safetensors file, or a folder with one; found {file.name!r}.")
    config, preprocessor, processor = (_read_json(file.parent / part) for part in (CONFIG, PREPROCESSOR, PROCESSOR))
    # transformers 5 keeps the image processor of a pair of towers beside its tokenizer, and looks there first.
    if "image_processor" in processor:
        preprocessor = processor["image_processor"]
    return Source(name, tensors, config, preprocessor, keep_alive)


_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


def _pickled(path: Path, files: Sequence[Path], target: Path) -> ValueError:
    return ValueError(
        f"{path}: pickled PyTorch files are not read here, since opening one runs code from it. Save it again as "
        f'safetensors, where PyTorch is installed:\n  python -c "import torch; from safetensors.torch import '
        f"save_file; s = {{k: v for f in {[str(file) for file in files]} for k, v in torch.load(f, "
        "map_location='cpu', weights_only=True).items()}; s = s.get('model', s.get('state_dict', s)); "
        "save_file({k: v.contiguous().clone() for k, v in s.items() if torch.is_tensor(v)}, "
        f'{str(target)!r})"'
    )


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold the bytes of a local checkpoint: one, or the shards of an index."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = _find_weights(file, str(path))
    if not file.name.endswith(".index.json"):
        return [file]
    return sorted({file.parent / name for name in _read_index(file).values()})


def _find_weights(folder: Path, name: str) -> Path:
    indexed = (f"{WEIGHTS}.index.json", "*.safetensors", "*.npz", "*.bin.index.json")
    for pattern in (WEIGHTS, *indexed, "*.bin", "*.pth", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise ValueError(f"{name}: which of these files is meant: {names}? Give the path of one.")
        if found:
            return found[0]
    run = f" For a run of ours give its own folder, {folder.parent}." if folder.name == "checkpoints" else ""
    raise ValueError(
        f"{name}: the folder holds no weights; expected {WEIGHTS}, an index of shards, or one .npz file.{run}"
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(content).__name__}.")
    return content


def _read_index(index: Path) -> dict[str, str]:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index}: expected a table 'weight_map' from tensors to files. Fetch the file again.")
    for name in files.values():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{index}: the shard {name!r} is not below the folder of the index: do not trust this file."
            )
    return files


def _read_shards(index: Path) -> dict[str, Tensor]:
    files = _read_index(index)
    if pickled := sorted({index.parent / file for file in files.values() if Path(file).suffix in _PICKLED}):
        raise _pickled(index, pickled, index.parent / WEIGHTS)
    shards = {}
    for file in sorted(set(files.values())):
        if not (index.parent / file).exists():
            raise FileNotFoundError(f"{index}: the shard {file!r} is missing. Fetch it into {index.parent}.")
        shards[file] = read_safetensors(index.parent / file)
    missing = [key for key, file in files.items() if key not in shards[file]]
    if missing:
        raise ValueError(f"{index}: {missing[0]!r} is not in the shard that the index names. Fetch the folder again.")
    return {key: shards[file][key] for key, file in files.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its memory-mapped bytes: they are copied once, by who reads them.

    Raises: ValueError: the file is truncated or has another format.
    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    size = path.stat().st_size
    damaged = f"{path}: truncated, or not a safetensors file"
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(f"{damaged} (its header should end at byte {start:,} of {size:,}). Fetch it again.")
        try:
            header = json.loads(file.read(start - 8))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{damaged} (its header is not JSON). Fetch it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{damaged} (its header is no JSON object). Fetch it again.")
    data = np.memmap(path, np.uint8, mode="r")
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(side) for side in entry["shape"])
            first, last = (start + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {key!r} is described as {entry!r}; expected a dtype out of {', '.join(DTYPES)}, a shape and "
                "two data_offsets. Fetch the file again, or save it with one of these types."
            ) from error
        if not start <= first <= last <= size:
            raise ValueError(
                f"{damaged} ({key!r} should be in bytes {first:,} to {last:,} of {size:,}). Fetch it again."
            )
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: {key!r} has {last - first:,} bytes, not those of {dtype} {shape}. Fetch the file again."
            )
        tensors[key] = Tensor(key, shape, dtype, _view(data, first, last, dtype, shape))
    return tensors


def _view(data: np.ndarray, first: int, last: int, dtype: np.dtype, shape: tuple[int, ...]):
    return lambda: data[first:last].view(dtype).reshape(shape)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file; the headers are read now, the members when asked for. Nothing is ever unpickled.

    Raises: ValueError: the file is truncated, no .npz, or holds pickled objects.
    """
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {
                info.filename.removesuffix(".npy"): (info, *_npy_header(archive, info)) for info in archive.infolist()
            }
    except PermissionError:
        raise
    except Exception as error:  # the readers of damaged archives and headers raise what they stumble over
        raise ValueError(f"{path}: truncated, damaged, or not an .npz file ({error}). Fetch it again.") from error
    opened = threading.local()
    for key, (info, shape, dtype) in headers.items():
        if dtype.hasobject:
            raise ValueError(
                f"{path}: {key!r} is a pickled Python object, which could run code when opened. Save the parameters as "
                "plain arrays, one per name: numpy.savez(path, **{name: array})."
            )
        # NumPy has no bfloat16 of its own and stores it as two raw bytes.
        stored = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
        tensors[key] = Tensor(key, shape, stored, _member(path, info, stored, opened))
    return tensors


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _member(path: Path, info: zipfile.ZipInfo, dtype: np.dtype, opened: threading.local) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        # Members are read by several threads. One ZipFile is not for that: some Pythons (3.13.0) move a position that
        # all share when they open a member. So each thread has its own.
        if not hasattr(opened, "archive"):
            opened.archive = zipfile.ZipFile(path)
        with opened.archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False).view(dtype)

    return read
