"""Data: sources of labelled pictures, host transforms, batches. `make_data` takes the `data` section of a config."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_flax.data.pipeline import Ahead, Batches, DecodeOnce, EvalBatches, eval_batches, train_batches
from vit_flax.data.read import OnError, Reader, Transform
from vit_flax.data.sources import SOURCES, Source, make_source
from vit_flax.data.transforms import make_transform

__all__ = [
    "SOURCES",
    "Ahead",
    "Batches",
    "Data",
    "EvalBatches",
    "Source",
    "eval_batches",
    "make_data",
    "make_source",
    "train_batches",
]


def make_data(
    *,
    source: Mapping[str, Any],
    train_split: str,
    eval_split: str,
    batch_size: int,
    eval_batch_size: int,
    train_transforms: Sequence[Mapping[str, Any]],
    eval_transforms: Sequence[Mapping[str, Any]],
    num_threads: int | None = None,
    num_workers: int = 0,
    decode_once: DecodeOnce = "auto",
    on_error: OnError = "raise",
) -> "Data":
    """Opens both splits of a source and checks them against each other; reads no picture yet.

    Args:
      source: `name`, a key of `SOURCES`, and that source's arguments except `split`.
      train_split: trained on.
      eval_split: evaluated on.
      batch_size: training examples per step, over all processes.
      eval_batch_size: evaluation examples per step, over all processes.
      train_transforms: `{"op": name, **arguments}` in order; see `vit_flax.data.transforms`.
      eval_transforms: the same for evaluation; none of them random.
      num_threads: see `train_batches`, as for the rest.
      num_workers: worker processes, 0 for none.
      decode_once: "auto", True or False.
      on_error: "raise" or "skip".

    Raises:
      ValueError: an unknown source, split or transform, splits with different classes, or random transforms where they
        must not be.
    """
    train_transform = make_transform(train_transforms)
    eval_transform = make_transform(eval_transforms)
    if not eval_transform.deterministic:
        raise ValueError("eval_transforms draw random numbers: an evaluation has to see the same pictures every time.")
    if decode_once is True and not train_transform.deterministic:
        raise ValueError("decode_once=True, but train_transforms draw random numbers: use 'auto' or False.")
    train_source = make_source(split=train_split, **source)
    open_split = functools.partial(_open_beside, train_source, train_split, source)
    return Data(
        train_source=train_source,
        eval_source=open_split(eval_split),
        open_split=open_split,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        train_transform=train_transform,
        eval_transform=eval_transform,
        reading={
            "num_threads": num_threads,
            "num_workers": num_workers,
            "decode_once": decode_once,
            "on_error": on_error,
        },
    )


def _open_beside(train_source: Source, train_split: str, source: Mapping[str, Any], split: str) -> Source:
    """Another split than the one that is trained on, with the same classes."""
    opened = make_source(split=split, **source)
    if train_source.class_names != opened.class_names:
        raise ValueError(
            f"{train_split!r} and {split!r} have different classes: "
            f"only in one of them {sorted(set(train_source.class_names) ^ set(opened.class_names))[:10]}"
        )
    return opened


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """The two splits of an experiment, ready to be batched on any number of processes."""

    train_source: Source
    eval_source: Source
    open_split: Callable[[str], Source]  # any other split to evaluate on
    batch_size: int
    eval_batch_size: int
    train_transform: Transform
    eval_transform: Transform
    reading: dict[str, Any]  # num_threads, num_workers, decode_once, on_error: how to read, not what

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train_source.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_train(self) -> int:
        return len(self.train_source)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images in a batch; decodes the first one."""
        return self._shape(self.train_source, self.train_transform)

    @functools.cached_property
    def eval_image_shape(self) -> tuple[int, int, int]:
        """The same of an evaluation."""
        return self._shape(self.eval_source, self.eval_transform)

    def _shape(self, source: Source, transform: Transform) -> tuple[int, int, int]:
        return Reader(source, transform, on_error=self.reading["on_error"], replace=True).image_shape

    def train(self, *, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1) -> Batches:
        """Endless training batches from `start_step` on; see `train_batches`."""
        return train_batches(
            self.train_source,
            transform=self.train_transform,
            batch_size=self.batch_size,
            seed=seed,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
            **self.reading,
        )

    def eval(self, *, process_index: int = 0, process_count: int = 1) -> EvalBatches:
        """The evaluation split, each example once; see `eval_batches`."""
        return eval_batches(
            self.eval_source,
            transform=self.eval_transform,
            batch_size=self.eval_batch_size,
            process_index=process_index,
            process_count=process_count,
            **self.reading,
        )

    def evaluated_on(self, split: str) -> "Data":
        """The same experiment, evaluated on another split. Raises: ValueError: none such, or it has other classes."""
        return dataclasses.replace(self, eval_source=self.open_split(split))

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of what is trained on, for the checkpoint: the same in all lives of a run."""
        return {"train": self.train_source.fingerprint()}
