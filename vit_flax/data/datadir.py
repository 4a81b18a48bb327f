"""Where prepared data lie, and how they get there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def data_dir_or_default(data_dir: str | os.PathLike[str] | None) -> Path:
    """`data_dir`, else $VIT_FLAX_DATA_DIR, else vit_flax/data in the user's cache folder."""
    if data_dir is None:
        data_dir = os.environ.get("VIT_FLAX_DATA_DIR") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vit_flax", "data"
        )
    return Path(data_dir).expanduser()


def write_once(directory: Path, write: Callable[[Path], None], *, marker: str) -> Path:
    """Fills `directory` unless it is filled, and returns it.

    It is written beside its place and renamed, so it is never seen half full, and two processes may come at the same
    time: the second one's work is thrown away.

    Args:
      directory: the place.
      write: gets an empty directory to fill.
      marker: a file that says, by being in `directory`, that it is filled.

    Raises:
      FileExistsError: something else is in its place; it is left alone.
      OSError: the place cannot be written.
    """
    if (directory / marker).exists():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".preparing-", dir=directory.parent))
    except OSError as error:
        raise OSError(f"cannot write data below {directory.parent}: {error}; choose another data_dir") from error
    try:
        write(scratch)
        if not (scratch / marker).exists():
            raise AssertionError(f"{write} left no {marker}")
        scratch.chmod(directory.parent.stat().st_mode & 0o777)  # mkdtemp's is for this user only
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not (directory / marker).exists():
        raise FileExistsError(f"{directory} exists but is not a prepared data set; move it away and run again")
    return directory
