"""Writing files so that a kill, or a full disk, leaves the old one or the new one."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old one or the new one."""
    new = path.with_name(f".{path.name}.new")  # one name: what a kill leaves behind is written over next time
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
