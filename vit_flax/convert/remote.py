"""Addresses with a scheme, such as hf://owner/name and gs://bucket/folder: fetched before they are read.

Nothing here runs unless the user gave such an address.
"""

import contextlib
import fnmatch
import glob
import importlib
import json
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
    folder, slash, last = "/".join(file).rpartition("/")

    def download(names: Sequence[str]) -> Path:
        patterns = [glob.escape(folder + slash + each) for each in names] if file else list(PATTERNS)
        root = hub.snapshot_download(f"{owner}/{name}", revision=revision or None, allow_patterns=patterns)
        return Path(root, *file)

    path = download([last, *beside])
    if file and not path.is_file():
        raise FileNotFoundError(f"{address}: there is no such file in the repository, or it is not in the cache.")
    if shards := _shards(path):
        download(shards)
    return Fetched(str(path))


def _through_fsspec(address: str, beside: Sequence[str]) -> Fetched:
    files, path = _require("fsspec").core.url_to_fs(address)
    if not files.exists(path):
        raise FileNotFoundError(f"{address}: there is no such file or folder.")
    temporary = tempfile.mkdtemp(prefix="vit_flax_")
    fetched = Fetched(temporary, temporary)
    if files.isdir(path):
        for file in files.ls(path, detail=False):
            if any(fnmatch.fnmatch(Path(file).name, pattern) for pattern in PATTERNS):
                files.get_file(file, f"{temporary}/{Path(file).name}")
        return fetched
    folder, slash, last = path.rpartition("/")
    fetched.path = f"{temporary}/{last}"
    files.get_file(path, fetched.path)
    for name in () if last.endswith(".npz") else beside:
        with contextlib.suppress(OSError):  # not there; some say so by forbidding to ask
            files.get_file(f"{folder}{slash}{name}", f"{temporary}/{name}")
    for name in _shards(Path(fetched.path)):
        Path(temporary, name).parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{folder}{slash}{name}", f"{temporary}/{name}")
    return fetched


def _shards(index: Path) -> list[str]:
    """The files that an index names below its folder; none of another file. What is wrong with one, its reader says."""
    if not index.name.endswith(INDEX):
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(n for n in names if isinstance(n, str) and not Path(n).is_absolute() and ".." not in Path(n).parts)


def _require(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"needs the package {library}: pip install {library}.") from error
