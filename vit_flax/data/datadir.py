"""Where prepared data lie, and how they get there whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_SCRATCH = ".preparing-"
# A younger scratch folder may not be locked yet, or be another machine's, whose locks not all file systems show.
_LEFT_SECS = 3600.0


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
    time: the second one's work is thrown away. What a killed process left is removed.

    Args:
      directory: the place.
      write: gets an empty directory to fill.
      marker: a file that says, by being in `directory`, that it is filled.

    Raises:
      FileExistsError: something else is in its place; it is left alone.
      PermissionError: the place cannot be written.
    """
    if (directory / marker).exists():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory.parent)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory.parent))
    except OSError as error:
        # Also where a file system is read-only, which Python gives no class of its own.
        raise PermissionError(
            f"cannot write data below {directory.parent}: {error}; choose another data_dir"
        ) from error
    held = _lock(scratch)
    try:
        write(scratch)
        if not (scratch / marker).exists():
            raise AssertionError(f"{write} left no {marker}")
        scratch.chmod(directory.parent.stat().st_mode & 0o777)  # mkdtemp's is for this user only
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)
    if not (directory / marker).exists():
        raise FileExistsError(f"{directory} exists but is not a prepared data set; move it away and run again")
    return directory


def _remove_leftovers(parent: Path) -> None:
    """Removes the scratch folders of processes that were killed: those that nobody holds."""
    for scratch in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # of another user, or gone by now
            if time.time() - scratch.stat().st_mtime > _LEFT_SECS and (held := _lock(scratch)) is not None:
                shutil.rmtree(scratch, ignore_errors=True)
                os.close(held)


def _lock(folder: Path) -> int | None:
    """Holds a folder until the descriptor is closed or this process ends; None if it is held, or cannot be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
