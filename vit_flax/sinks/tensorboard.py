"""TensorBoard event files, written without TensorFlow."""

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
        from tensorboardX import SummaryWriter

        self._config = config
        # tensorboardX names files by the second, and would write over those of a life that was as short.
        unique = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1, filename_suffix=unique)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds points to the curves; a number that was not finite is a gap."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def finish(self, results: Mapping[str, float]) -> None:
        """Adds the run to the table of the HPARAMS tab."""
        values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self._config.items()}
        self._writer.add_hparams(values, {f"final/{name}": value for name, value in results.items()}, name="hparams")

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()
