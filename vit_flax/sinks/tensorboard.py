"""TensorBoard event files, written without TensorFlow."""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class TensorBoard:
    """Scalars, pictures and hyper-parameters below `tensorboard/`: `tensorboard --logdir WORKDIR`.

    Args:
      workdir: of the run.
      start_step: the step that the run goes on from; TensorBoard forgets what an earlier life wrote beyond it.
      config: dotted key -> value.
    """

    def __init__(self, *, workdir: Path, start_step: int, config: Mapping[str, Any]):
        # 0.7 s to import, which `vit_flax.main --help` and the dry run need not wait for.
        from tensorboardX.proto.event_pb2 import SessionLog  # type: ignore[attr-defined]  (made when it is imported)

        self._folder, self._config = workdir / "tensorboard", config
        self._events = _Events(self._folder)
        self._events.add(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds points to the curves; a number that was not finite is a gap."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if value is not None:
                self._events.add(step=step, summary=scalar(name, value))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture."""
        from tensorboardX import summary

        self._events.add(step=step, summary=summary.image(name, image, dataformats="HWC"))

    def finish(self, results: Mapping[str, float]) -> None:
        """Adds the run to the table of the HPARAMS tab."""
        from tensorboardX.summary import hparams, scalar

        values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self._config.items()}
        final = {f"final/{name}": value for name, value in results.items()}
        events = _Events(self._folder / "hparams")
        for summary in (*hparams(values, final), *(scalar(name, value) for name, value in final.items())):
            events.add(summary=summary)
        events.close()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class _Events:
    """A new file of events, each written at once.

    tensorboardX's own writer hands them to a thread. A full disk ends that thread, and the run waits for it for ever.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}", "xb")  # noqa: SIM115
        self.add(file_version="brain.Event:2")

    def add(self, **what: Any) -> None:
        """Writes an event: its length and itself, each with a checksum after it."""
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboardX.record_writer import masked_crc32c

        data = Event(wall_time=time.time(), **what).SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
