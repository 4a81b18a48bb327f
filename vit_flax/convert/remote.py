"""Addresses with a scheme, such as hf://owner/name and gs://bucket/folder: fetched before they are read.

Nothing here runs unless the user gave such an address.
"""

import fnmatch
import glob
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATTERNS = ("*.json", "*.safetensors", "*.npz")  # of a folder
INDEX = ".index.json"  # the end of a file that names shards beside it


class Fetched:
    """A local copy of a remote file or folder.

    Attributes:
      path: of the copy. Where it lies in a temporary folder, that is removed when this object goes.
    """

    def __init__(self, path: str, temporary: str | None = None):
        self.path = path
        if temporary is not None:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)


def fetch(address: str, beside: Sequence[str] = ()) -> Fetched:
    """Copies a remote file with the configuration beside it, or the weights and configuration in a remote folder.

    Args:
      address: hf://owner/name[@revision][/file] through huggingface_hub (into its cache); anything else, such as
        gs://bucket/file.npz, through fsspec (into a temporary folder).
      beside: names of files that come along with a single file where they are; the shards of an index always do.

    Raises:
      ModuleNotFoundError: a package is not installed; says which.
      OSError: the address cannot be read; says why.
    """
    fetch_it = _from_hub if address.startswith("hf://") else _through_fsspec
    try:
        return fetch_it(address, beside)
    except ImportError as error:
        raise ModuleNotFoundError(f"{address}: {error}") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # each library behind an address has exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{address}: could not be fetched ({type(error).__name__}: {reason}).") from error


def _from_hub(address: str, beside: Sequence[str]) -> Fetched:
    hub = _require("huggingface_hub")
    owner, name, *file = address.removeprefix("hf://").split("/", 2)
    name, _, revision = name.partition("@")
    patterns = list(PATTERNS)
    if file:
        folder, slash, last = file[0].rpartition("/")
        shards = ["*.safetensors"] if last.endswith(INDEX) else []
        patterns = [glob.escape(folder) + slash + pattern for pattern in (glob.escape(last), *beside, *shards)]
    root = hub.snapshot_download(f"{owner}/{name}", revision=revision or None, allow_patterns=patterns)
    path = Path(root, *file)
    if file and not path.is_file():
        raise FileNotFoundError(f"{address}: there is no such file in the repository.")
    return Fetched(str(path))


def _through_fsspec(address: str, beside: Sequence[str]) -> Fetched:
    files, path = _require("fsspec").core.url_to_fs(address)
    if not files.exists(path):
        raise FileNotFoundError(f"{address}: there is no such file or folder.")
    temporary = tempfile.mkdtemp(prefix="vit_flax_")
    fetched = Fetched(temporary, temporary)
    if files.isdir(path):
        wanted = _listed(files, path, PATTERNS)
    else:
        folder, slash, last = path.rpartition("/")
        # Not every file system can list a folder (https cannot): what may be there is asked for by its name.
        wanted = [path, *(f"{folder}{slash}{name}" for name in beside if files.exists(f"{folder}{slash}{name}"))]
        wanted += _listed(files, folder, ["*.safetensors"]) if last.endswith(INDEX) else []
        fetched.path = f"{temporary}/{last}"
    for file in wanted:
        files.get_file(file, f"{temporary}/{Path(file).name}")
    return fetched


def _listed(files: Any, folder: str, patterns: Sequence[str]) -> list[str]:
    names = files.ls(folder, detail=False)
    return [file for file in names if any(fnmatch.fnmatch(Path(file).name, pattern) for pattern in patterns)]


def _require(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"needs the package {library}: pip install {library}.") from error
