"""Addresses with a scheme, such as hf://owner/name and gs://bucket/folder: fetched before they are read.

Nothing here runs unless the user gave such an address.
"""

import fnmatch
import importlib
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

PATTERNS = ("*.json", "*.safetensors", "*.npz")


class Fetched:
    """A local copy of a remote file or folder.

    Attributes:
      path: of the copy. Where it lies in a temporary folder, that is removed when this object goes.
    """

    def __init__(self, path: str, temporary: str | None = None):
        self.path = path
        if temporary is not None:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)


def fetch(address: str) -> Fetched:
    """Copies a remote file, or the weights and configuration in a remote folder, to this machine.

    Args:
      address: hf://owner/name[@revision][/file] through huggingface_hub (into its cache); anything else, such as
        gs://bucket/file.npz, through fsspec (into a temporary folder).

    Raises:
      ModuleNotFoundError: a package is not installed; says which.
      OSError: the address cannot be read; says why.
    """
    fetch_it = _from_hub if address.startswith("hf://") else _through_fsspec
    try:
        return fetch_it(address)
    except ImportError as error:
        raise ModuleNotFoundError(f"{address}: {error}") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # each library behind an address has exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{address}: could not be fetched ({type(error).__name__}: {reason}).") from error


def _from_hub(address: str) -> Fetched:
    hub = _require("huggingface_hub")
    owner, name, *file = address.removeprefix("hf://").split("/", 2)
    name, _, revision = name.partition("@")
    if file:
        return Fetched(hub.hf_hub_download(f"{owner}/{name}", file[0], revision=revision or None))
    return Fetched(hub.snapshot_download(f"{owner}/{name}", revision=revision or None, allow_patterns=list(PATTERNS)))


def _through_fsspec(address: str) -> Fetched:
    files, path = _require("fsspec").core.url_to_fs(address)
    if not files.exists(path):
        raise FileNotFoundError(f"{address}: there is no such file or folder.")
    temporary = tempfile.mkdtemp(prefix="vit_flax_")
    fetched = Fetched(f"{temporary}/{Path(path).name}", temporary)
    if not files.isdir(path):
        files.get_file(path, fetched.path)
        return fetched
    Path(fetched.path).mkdir()
    for file in files.ls(path, detail=False):
        if any(fnmatch.fnmatch(Path(file).name, pattern) for pattern in PATTERNS):
            files.get_file(file, f"{fetched.path}/{Path(file).name}")
    return fetched


def _require(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"needs the package {library}: pip install {library}.") from error
