"""Where the numbers of a run go: `SINKS`, one class each with the same four methods (`Sink`).

The `sinks` section of a config names them: `config.sinks = dict(csv=dict(), wandb=dict(project="digits"))`. The
files that a run reads itself (`files.Files`) are always written.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_flax.sinks.files import Csv
from vit_flax.sinks.servers import MLflow, WandB
from vit_flax.sinks.tensorboard import TensorBoard


@runtime_checkable
class Sink(Protocol):
    """Receives what a run has to say. All of a step comes before anything of a later step."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Numbers by name, such as "train/loss"; None where a number was not finite."""
        ...

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 [h, w, c]."""
        ...

    def finish(self, results: Mapping[str, float]) -> None:
        """The last numbers of a run that went through to its end."""
        ...

    def close(self) -> None:
        """Writes everything down, however the run ended."""
        ...


SINKS: dict[str, Any] = {"csv": Csv, "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}

# Sinks whose package is an extra; all three have the same name.
EXTRAS = ("wandb", "mlflow")


def check_installed(name: str) -> None:
    """Raises ValueError with the command that installs what a sink needs, if it is not there."""
    if name in EXTRAS and importlib.util.find_spec(name) is None:
        raise ValueError(f"the package {name} is not installed: pip install 'vit_flax[{name}]'")
