"""Writing files so that a kill, or a full disk, leaves the old one or the new one; and what JSON keeps of a value."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old one or the new one."""
    new = unfinished(path)
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def unfinished(path: Path) -> Path:
    """Where a file is while it is written; one name, so that what a kill leaves behind is written over next time."""
    return path.with_name(f".{path.name}.new")


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, strings for the keys of dicts."""
    return json.loads(json.dumps(value))
