"""A few predictions to look at: right ones of different classes, and the wrong ones that were surest."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

NUM_RIGHT = 12
NUM_WRONG = 12
SIDE_PX = 160  # of a stored picture; larger ones are made smaller


class Samples:
    """Chooses among the predictions of this process while an evaluation goes over them.

    Args:
      num_classes: right predictions are spread over the classes.
      shard: which part of every batch this process has, and how many parts there are.
    """

    def __init__(self, num_classes: int, shard: tuple[int, int] = (0, 1)):
        self._shard, self._num_shards = shard
        self._per_class = max(1, NUM_RIGHT // num_classes)
        self._right: list[dict[str, Any]] = []
        self._wrong: list[dict[str, Any]] = []
        self._row = 0

    def add(self, batch: dict[str, np.ndarray], probabilities: np.ndarray, classes: np.ndarray) -> None:
        """Takes a batch and its most probable classes [b, k], best first."""
        labels, mask = batch["label"], batch["mask"]
        hits = classes[:, 0] == labels
        for i in np.flatnonzero(mask & hits).tolist():
            if len(self._right) == NUM_RIGHT:
                break
            if sum(sample["label"] == labels[i] for sample in self._right) < self._per_class:
                self._right.append(self._sample(batch, i, probabilities, classes))
        surest = sorted(np.flatnonzero(mask & ~hits).tolist(), key=lambda i: -probabilities[i, 0])[:NUM_WRONG]
        self._wrong += [self._sample(batch, i, probabilities, classes) for i in surest]
        self._wrong = sorted(self._wrong, key=lambda sample: -sample["probabilities"][0])[:NUM_WRONG]
        self._row += len(labels) * self._num_shards

    def chosen(self) -> list[dict[str, Any]]:
        """The wrong ones, surest first, then the right ones; `image` is uint8 [h, w, c]."""
        return self._wrong + self._right

    def _sample(self, batch: dict[str, np.ndarray], i: int, probabilities: np.ndarray, classes: np.ndarray) -> dict:
        return {
            "row": self._row + self._shard * len(batch["label"]) + i,
            "label": int(batch["label"][i]),
            "classes": classes[i].tolist(),
            "probabilities": probabilities[i].tolist(),
            "image": np.array(batch["image"][i]),
        }


def data_uri(image: np.ndarray) -> str:
    """The picture inside a text: small ones exact, larger ones as a JPEG of at most `SIDE_PX`.

    Args:
      image: uint8 [h, w, c]; of other than 1 or 3 channels, the first is shown.
    """
    picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    exact = max(picture.size) <= 64
    picture.thumbnail((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    picture.save(file, "PNG" if exact else "JPEG", **({} if exact else {"quality": 85}))
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
