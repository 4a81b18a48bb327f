"""Addresses with a scheme, such as hf://owner/name and gs://bucket/folder: fetched into a temporary folder.

Nothing here runs unless the user gave such an address.
"""

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATTERNS = ["*.json", "*.safetensors", "*.npz"]


@dataclass(frozen=True)
class Fetched:
    """A local copy; it is removed when this object goes.

    Attributes:
      path: of the file or folder.
      holder: the temporary folder, or None where the copy lives in a cache of its own.
    """

    path: str
    holder: tempfile.TemporaryDirectory | None = None


def fetch(address: str) -> Fetched:
    """Copies a remote file or folder to this machine.

    Args:
      address: hf://owner/name or hf://owner/name/file through huggingface_hub (with its cache); anything else, such as
        gs://bucket/file.npz, through fsspec.

    Raises: ModuleNotFoundError: the library that speaks the scheme is not installed; says which.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "hf":
        hub = _require("huggingface_hub", address)
        owner, name, *file = rest.split("/", 2)
        if file:
            return Fetched(hub.hf_hub_download(f"{owner}/{name}", file[0]))
        return Fetched(hub.snapshot_download(f"{owner}/{name}", allow_patterns=PATTERNS))
    files, path = _require("fsspec", address).core.url_to_fs(address)
    if not files.exists(path):
        raise FileNotFoundError(f"{address}: there is no such file or folder.")
    holder = tempfile.TemporaryDirectory(prefix="vit_flax_")
    target = Path(holder.name) / Path(path).name
    files.get(path, str(target), recursive=files.isdir(path))
    return Fetched(str(target), holder)


def _require(library: str, address: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{address}: needs the package {library}: pip install {library}.") from error
