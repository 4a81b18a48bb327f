"""Servers that collect the runs of a group: Weights & Biases and MLflow. Their packages are extras.

    pip install 'vit_flax[wandb]'      pip install 'vit_flax[mlflow]'

Neither can take points back. What a run repeats after a restart is equal, bit for bit, to what it sent before.
"""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_flax.files import write_atomically


class WandB:
    """One W&B run per workdir: a run that goes on from a checkpoint goes on in the same W&B run.

    Points of steps that W&B has already are left out.

    Args:
      workdir: of the run; its name is the default of `name`.
      config: dotted key -> value.
      project: of W&B.
      entity: user or team; None for the one that is logged in.
      name: of the run.
      group: of runs, such as a sweep.
      tags: of the run.
      mode: "online", "offline" or "disabled"; None for what WANDB_MODE says, else online.
    """

    def __init__(
        self,
        *,
        workdir: Path,
        config: Mapping[str, Any],
        project: str,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ):
        import wandb

        id_file = workdir / "wandb_run_id"
        run_id = id_file.read_text(encoding="utf-8") if id_file.exists() else uuid.uuid4().hex[:12]
        self._picture = wandb.Image
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            dir=str(workdir),
            config={key: list(v) if isinstance(v, tuple) else v for key, v in config.items()},
            project=project,
            entity=entity,
            name=name or workdir.name,
            group=group,
            tags=list(tags),
            mode=mode,
        )
        write_atomically(id_file, run_id)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds points to the curves."""
        self._log(step, {name: value for name, value in values.items() if value is not None})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture."""
        self._log(step, {name: self._picture(image)})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)

    def finish(self, results: Mapping[str, float]) -> None:
        """Sets the summary of the run."""
        self._run.summary.update(dict(results))

    def close(self) -> None:
        """Waits until everything is uploaded."""
        self._run.finish()


class MLflow:
    """One MLflow run per workdir: a run that goes on from a checkpoint goes on in the same MLflow run.

    Points of steps that are repeated after a restart appear twice.

    Args:
      workdir: of the run; its name is the default of `name`.
      config: dotted key -> value.
      experiment: of MLflow.
      tracking_uri: such as "http://host:5000" or "sqlite:///mlflow.db"; None for what MLFLOW_TRACKING_URI says, else
        MLflow's default.
      name: of the run.
    """

    def __init__(
        self,
        *,
        workdir: Path,
        config: Mapping[str, Any],
        experiment: str,
        tracking_uri: str | None = None,
        name: str | None = None,
    ):
        import mlflow

        self._mlflow = mlflow
        id_file = workdir / "mlflow_run_id"
        if tracking_uri is not None:
            mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_experiment(experiment)
        if id_file.exists():
            mlflow.start_run(run_id=id_file.read_text(encoding="utf-8"))
            return
        run = mlflow.start_run(run_name=name or workdir.name)
        write_atomically(id_file, run.info.run_id)
        params = list(config.items())
        for start in range(0, len(params), 100):  # a request takes no more
            mlflow.log_params(dict(params[start : start + 100]))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds points to the curves, without waiting for the server."""
        points = {name: value for name, value in values.items() if value is not None}
        self._mlflow.log_metrics(points, step=step, synchronous=False)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture to the run's artifacts."""
        self._mlflow.log_image(image, artifact_file=f"pictures/{name}_{step}.png")

    def finish(self, results: Mapping[str, float]) -> None:
        """Nothing: MLflow shows the last point of every curve."""

    def close(self) -> None:
        """Waits until everything has arrived."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()
