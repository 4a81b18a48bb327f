"""Reading one example: source, transform, checks; and what happens to a picture that cannot be read."""

import math
from typing import Any, Literal, Protocol

import numpy as np
from absl import logging

from vit_flax.data.decode import DecodeError
from vit_flax.data.sources import Example, Source

OnError = Literal["raise", "skip"]

ADVICE = "python -m vit_flax.data.check lists all bad records; data.on_error='skip' goes on without them"
MAX_BAD_IN_A_ROW = 100  # then "skip" gives up: the whole set is bad, or its disk is gone


class Transform(Protocol):
    """A picklable function of an example and random numbers; `transforms.make_transform` makes them."""

    @property
    def deterministic(self) -> bool:
        """Whether it never draws from the random numbers, which may be None then."""
        ...

    def __call__(self, example: Example, rng: np.random.Generator | None, /) -> Example: ...


class Reader:
    """A row number -> `{"image", "label", "mask", "skipped"}`. Picklable: it goes to the worker processes.

    Rows beyond the end of the source are padding: zeros, with mask False. "skipped" is the row that could not be read,
    else -1: it travels with the batch, because a worker process has no other way to report it.

    Args:
      source: what to read.
      transform: see `train_batches`.
      on_error: "raise", or "skip" a picture that cannot be read or decoded.
      replace: what "skip" puts in its place: True, the next row that can be read (training); False, padding
        (evaluation, which must count no other picture twice).

    Raises:
      ValueError: an empty source; everything that reading its first row may raise.
    """

    def __init__(self, source: Source, transform: Transform, *, on_error: OnError, replace: bool):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'")
        if not len(source):
            raise ValueError(f"{source!r} is empty")
        self.source, self.transform, self.on_error, self.replace = source, transform, on_error, replace
        self.deterministic = transform.deterministic
        self._shapes: tuple[tuple[int, int, int], tuple[int, ...]] | None = None  # of the images and the labels
        self._reported: set[int] = set()
        rng = None if self.deterministic else np.random.default_rng(0)
        first = self._read_next(0, rng) if on_error == "skip" else self(0, rng)
        self._shapes = first["image"].shape, first["label"].shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every example."""
        assert self._shapes is not None
        return self._shapes[0]

    @property
    def example_bytes(self) -> int:
        """The size of one example's pixels."""
        return math.prod(self.image_shape)

    def __call__(self, row: int, rng: np.random.Generator | None) -> dict[str, Any]:
        if row >= len(self.source):
            return self._padding()
        try:
            return self._read(row, rng)
        except (DecodeError, OSError) as error:
            if self.on_error == "skip":
                self._report(row, error)
            elif isinstance(error, DecodeError):
                raise DecodeError(error.record_id, f"{error.problem} ({ADVICE})") from error
            else:
                raise
        example = self._read_next(row + 1, rng) if self.replace else self._padding()
        return {**example, "skipped": np.int64(row)}

    def _read(self, row: int, rng: np.random.Generator | None) -> dict[str, Any]:
        example = self.source[int(row)]
        label = checked_label(example, len(self.source.class_names))
        try:
            image = self.transform(example, rng)["image"]
        except DecodeError:
            raise
        except ValueError as error:  # of an operation, which does not know what it works on
            raise ValueError(f"{example['id']}: {error}") from error
        if image.dtype != np.uint8 or image.ndim != 3:
            found = f"{image.dtype} {image.shape}"
            raise ValueError(f"{example['id']}: expected uint8 [h, w, c] after the transforms, found {found}")
        image_shape, label_shape = self._shapes or (image.shape, label.shape)
        if label.shape != label_shape:
            raise ValueError(f"{example['id']}: label has shape {label.shape}, the first one {label_shape}")
        if image.shape != image_shape:
            raise ValueError(
                f"{example['id']} has shape {image.shape} after the transforms, the first example {image_shape}: "
                "end the transforms with a resize or a crop to one size"
            )
        return {"image": image, "label": label, "mask": np.True_, "skipped": np.int64(-1)}

    def _read_next(self, row: int, rng: np.random.Generator | None) -> dict[str, Any]:
        last_error = None
        for offset in range(min(len(self.source), MAX_BAD_IN_A_ROW)):
            candidate = (row + offset) % len(self.source)
            try:
                return self._read(candidate, rng)
            except (DecodeError, OSError) as error:
                self._report(candidate, error)
                last_error = error
        count = min(len(self.source), MAX_BAD_IN_A_ROW)
        raise ValueError(
            f"too many bad records in a row, none of {count} could be read; the last: {last_error}"
        ) from last_error

    def _report(self, row: int, error: Exception) -> None:
        if row not in self._reported:
            self._reported.add(row)
            logging.warning("skipped record %d: %s", row, error)

    def _padding(self) -> dict[str, Any]:
        assert self._shapes is not None
        image_shape, label_shape = self._shapes
        return {
            "image": np.zeros(image_shape, np.uint8),
            "label": np.zeros(label_shape, np.uint8 if label_shape else np.int32),
            "mask": np.False_,
            "skipped": np.int64(-1),
        }


def checked_label(example: Example, num_classes: int) -> np.ndarray:
    """The label as int32 [] or, for multi-label data, uint8 [v].

    Raises:
      ValueError: no class has this number, or it is no row of zeros and ones; the message names the record.
    """
    label = np.asarray(example["label"])
    if label.ndim == 1:
        if len(label) != num_classes or not np.isin(label, (0, 1)).all():
            raise ValueError(f"{example['id']}: expected {num_classes} zeros and ones as label, found {label}")
        return label.astype(np.uint8)
    if label.dtype.kind not in "iu":
        raise ValueError(f"{example['id']}: expected a whole number as label, found {example['label']!r}")
    if label.ndim or not 0 <= label < num_classes:
        raise ValueError(f"{example['id']}: label {label} is outside 0..{num_classes - 1} ({num_classes} classes)")
    return label.astype(np.int32)
