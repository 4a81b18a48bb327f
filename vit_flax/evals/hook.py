"""An evaluation as a hook of the training loop: runs it, and writes figures, pictures and details."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from vit_flax import pictures
from vit_flax.evals.samples import data_uri
from vit_flax.files import write_atomically
from vit_flax.step import TrainState
from vit_flax.train_log import TrainLog
from vit_flax.typing import PyTree
from vit_flax.writer import Writer, as_text


@runtime_checkable
class Evaluation(Protocol):
    """What is in `EVALS`."""

    figures: tuple[str, ...]
    several_labels: bool
    details: dict[str, Any]

    def run(self, state: TrainState) -> dict[str, float]:
        """Figures by name."""
        ...


class EvaluationHook:
    """`hook(step, state)`.

    Args:
      name: starts the names of the figures: "<name>/top1".
      evaluation: to run.
      weights: `(opt_state, params) -> params` to evaluate.
      writer: receives figures and pictures; the details go to `evals/<name>.json` in its workdir, for the report.
      log: whose throughput is not to count the time that this takes; None: the caller sees to that, or nothing trains.
      results: receives the figures.
      class_names: of the split.
      example_id: row number -> the name of that example.
    """

    def __init__(
        self,
        name: str,
        evaluation: Evaluation,
        *,
        weights: Callable[[PyTree, PyTree], PyTree],
        writer: Writer,
        log: TrainLog | None,
        results: dict[str, float],
        class_names: Sequence[str],
        example_id: Callable[[int], str],
    ):
        self._name, self._evaluation, self._weights = name, evaluation, weights
        self._writer, self._log, self._results = writer, log, results
        self._class_names, self._example_id = class_names, example_id

    def __call__(self, step: int, state: TrainState) -> None:
        """Evaluates the state."""
        if self._log is not None:
            self._log.flush()
        jax.block_until_ready(state.step)  # the time of the training step is not ours
        since = time.perf_counter()
        state = state.replace(params=self._weights(state.opt_state, state.params))
        found = {f"{self._name}/{metric}": value for metric, value in self._evaluation.run(state).items()}
        self._writer.write(step, found)
        self._results.update(found)  # from here on no later life evaluates it again
        self._writer.say(f"step {step} " + "  ".join(f"{name} {as_text(name, value)}" for name, value in found.items()))
        if self._writer.workdir is not None and self._writer.active:
            self._write_details(step, "moving average of the parameters" if state.ema is not None else "parameters")
        if self._log is not None:
            self._log.exclude(time.perf_counter() - since)

    def _write_details(self, step: int, weights: str) -> None:
        details = self._evaluation.details
        if "confusion" in details:
            matrix = np.asarray(details["confusion"])
            self._writer.picture(step, f"{self._name}/confusion", pictures.confusion(matrix, self._class_names))
        samples = [
            sample | {"image": data_uri(sample["image"]), "id": self._example_id(sample["row"])}
            for sample in details.get("samples", [])
        ]
        record = {"step": step, "weights": weights, "class_names": list(self._class_names), **details}
        path = self._writer.workdir / "evals" / f"{self._name}.json"  # type: ignore[operator]
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(record | {"samples": samples}) + "\n")
