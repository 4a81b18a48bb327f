"""How fast a checkpoint loads and how much memory that takes: `python -m vit_flax.convert --describe IN --time`."""

import statistics
import time
from pathlib import Path

import numpy as np

from vit_flax.convert.pretrained import load_pretrained
from vit_flax.convert.source import weight_files
from vit_flax.convert.workdir import is_workdir

MIB = 2**20
TURNS = 7  # their median counts; the first load is named apart, as it compiles the shapes of the model


def measure(path: str | Path, *, family: str | None) -> str:
    """Loads a checkpoint several times, in turn with NumPy reading and copying the bytes of its files.

    Turn by turn, because other work on the machine then disturbs both alike. The files are in the page cache after the
    first turn, and what is compared is the work, not the disk.

    Args:
      path: of a local checkpoint.
      family: as in `load_pretrained`.

    Returns: lines of text: times, their ratio, peak memory above that of the idle process as a multiple of the files.
    """
    files = weight_files(path)
    size = sum(file.stat().st_size for file in files)
    memory = _peak_bytes(path, family)  # first: memory that an earlier load gave back may still count as resident
    _read_and_copy(files)
    numpy_secs, load_secs = [], []
    for _ in range(TURNS):
        start = time.perf_counter()
        _read_and_copy(files)
        middle = time.perf_counter()
        load_pretrained(path, family=family)
        numpy_secs.append(middle - start)
        load_secs.append(time.perf_counter() - middle)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(load_secs, numpy_secs, strict=True))
    return "\n".join(
        [
            f"{len(files)} file(s), {size / MIB:,.1f} MiB; median of {TURNS} turns, spread in brackets",
            f"NumPy reads and copies the bytes in {_spread(numpy_secs)}",
            f"load_pretrained takes               {_spread(load_secs)}; the first load {load_secs[0]:.3f} s",
            f"ratio                               {ratio:.2f}",
            "peak memory above the idle process  "
            + (
                "not measured: needs Linux"
                if memory is None
                else f"{memory / MIB:,.1f} MiB = {memory / size:.2f} files"
            ),
        ]
    )


def check_files(path: str | Path) -> None:
    """Raises a ValueError where a checkpoint is not in files that NumPy could read as they are."""
    if "://" in str(path) or is_workdir(str(Path(path).expanduser())):
        raise ValueError(
            f"--time compares with NumPy reading the files of a checkpoint, and {path} is an address or a run, whose "
            "files hold more than the weights. Convert it first (IN OUT --to vit_flax), and measure OUT."
        )


def _read_and_copy(files: list[Path]) -> None:
    for file in files:
        np.fromfile(file, np.uint8).copy()


def _spread(secs: list[float]) -> str:
    return f"{statistics.median(secs):.3f} s ({min(secs):.3f} to {max(secs):.3f})"


def _peak_bytes(path: str | Path, family: str | None) -> int | None:
    """The rise of the resident memory while loading, mapped pages of the file included."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    loaded = load_pretrained(path, family=family)
    peak = _status("VmHWM") - before
    del loaded
    return peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
