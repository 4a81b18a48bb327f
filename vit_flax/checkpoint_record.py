"""The record of a checkpoint: one JSON file that says what the checkpoint is, sealed with its own SHA-256.

step          number of steps taken
identity      what must be the same for a run to go on from here
about         config, class_names, preprocessing: what a reader wants to know
metrics       of an evaluation of this very state; empty if there was none
progress      what the trainer needs besides the state
shapes        path of each array -> [shape, dtype]
checksums     path of each array -> uint32, see vit_flax/checksums.py
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from vit_flax.files import as_json

RECORD = "record"  # the name of the item, and of the file in it


def steps_in(directory: Path) -> list[int]:
    """Numbers of the checkpoints in a folder, oldest first; one may be damaged."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def read_record(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, checked against its own checksum.

    Raises: FileNotFoundError: it has none. OSError: it is damaged.
    """
    try:
        sealed = json.loads((path / RECORD / RECORD).read_text(encoding="utf-8"))
        record = sealed["record"]
        whole = sealed["sha256"] == _digest(record) and record["step"] == int(path.name)
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"its record cannot be read ({type(error).__name__}: {error})") from error
    if not whole:
        raise OSError("its record does not agree with its checksum")
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> str:
    """The text of the file."""
    record = as_json(record)
    return json.dumps({"sha256": _digest(record), "record": record})


class RecordHandler(ocp.JsonCheckpointHandler):
    """Writes the record in Orbax's background thread, and to the disk before the step gets its final name."""

    async def async_save(self, directory: Any, item: Any = None, args: Any = None) -> list[Any]:
        """Returns what Orbax waits for before it commits the step."""
        del item

        async def write() -> None:
            if jax.process_index() == 0:
                with open(directory / RECORD, "w", encoding="utf-8") as file:
                    file.write(args.text())
                    file.flush()
                    os.fsync(file.fileno())

        return [future.CommitFutureAwaitingContractedSignals(write(), name=RECORD)]


@ocp.args.register_with_handler(RecordHandler, for_save=True, for_restore=True)  # Orbax wants both; we never restore
@dataclasses.dataclass
class RecordSave(ocp.args.CheckpointArgs):
    """What `RecordHandler` writes: a function, because the checksums may not be there yet."""

    text: Callable[[], str]
