"""Sources of labelled pictures: something with a length whose items are `{"image", "label", "id"}`.

A source reads and nothing else: `image` is the encoded file as it lies on disk (bytes) or a uint8 array [h, w, c];
decoding, checking and batching are the pipeline's. `make_source(name=..., split=...)` finds a source in `SOURCES`.
"""

import ast
import contextlib
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_flax.data.archives import cifar10, cifar100, fashion_mnist, mnist
from vit_flax.data.arrays import Arrays
from vit_flax.data.datadir import data_dir_or_default
from vit_flax.data.decode import DecodeError
from vit_flax.data.fingerprint import fingerprint_of
from vit_flax.data.folder import Folder
from vit_flax.data.huggingface import HuggingFace
from vit_flax.data.records import Records

Example = dict[str, Any]  # {"image": bytes | uint8 [h, w, c], "label": int | int array, "id": str}


@runtime_checkable
class Source(Protocol):
    """What the pipeline and the evaluations read from."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def fingerprint(self) -> dict[str, Any]:
        """Says in JSON-able values what was read: name, split, number of examples, class names."""
        ...


def make_source(*, name: str | None = None, split: str, **kwargs: Any) -> Source:
    """Opens a source by its name in `SOURCES`.

    Args:
      name: a key of `SOURCES`; None is an error like any other name that is none.
      split: which part; "train" and "test" exist nearly everywhere, the `tfds` family also takes "train[:90%]".
      **kwargs: the arguments of that source.

    Raises:
      ValueError: no such source, no such split, or an empty one.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        what = "the source has no name" if name is None else f"unknown data source {name!r}"
        raise ValueError(f"{what}{hint} Known: {', '.join(sorted(SOURCES))}")
    source = SOURCES[name](split=split, **kwargs)
    if not len(source):
        raise ValueError(f"split {split!r} of data source {name!r} is empty: {source!r}")
    return source


def parse_source(words: Sequence[str]) -> dict[str, Any]:
    """Reads a source from a command line: ["folder", "root=DIR"] -> {"name": "folder", "root": "DIR"}.

    Values are Python literals where they can be read as such, else text; paths and names are always text.

    Raises:
      ValueError: a word after the first that is no key=value.
    """
    source: dict[str, Any] = {"name": words[0]}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"expected key=value after the source's name, found {word!r}")
        source[key] = value
        if key not in _TEXTS:
            with contextlib.suppress(ValueError, SyntaxError):
                source[key] = ast.literal_eval(value)
    return source


_TEXTS = {"root", "csv", "path", "directory", "data_dir", "dataset", "config", "revision"}  # a folder called 2012


class Tfds:
    """A TFDS image-classification set that was prepared as array_record, read without TensorFlow.

    Pictures stay encoded: TFDS's own NumPy decoder is wrong for CMYK and palette files.

    Args:
      split: TFDS split syntax, e.g. "train", "train[:98%]", "train[10:20]+test[:5]".
      dataset: TFDS name, with config and version where wanted ("imagenet2012", "my_set/big:1.0.0").
      data_dir: where the set was prepared; None: TFDS's own default.
      directory: instead of the two above, the folder that holds `dataset_info.json`.
      image_key: name of the image feature.
      label_key: name of the label feature: a class, or a list of classes (multi-label).
    """

    def __init__(
        self,
        *,
        split: str,
        dataset: str | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        image_key: str = "image",
        label_key: str = "label",
    ):
        import tensorflow_datasets as tfds

        if dataset is not None and directory is None:
            builder = _open_dataset(dataset, data_dir)
        elif directory is not None and dataset is None:
            builder = _open_directory(directory)
        else:
            raise ValueError(f"give the tfds source either dataset= or directory=, found {dataset=} and {directory=}")
        self.name, self.split = builder.info.full_name, split
        self._image_key, self._label_key = image_key, label_key
        features = builder.info.features
        for key in (image_key, label_key):
            if features is None or key not in features:
                raise ValueError(f"{self.name} has no feature {key!r}; it has {sorted(features or ())}")
        label = features[label_key]
        self._multi_label = isinstance(label, tfds.features.Sequence)
        names = getattr(label.feature if self._multi_label else label, "names", None)
        if names is None:
            raise ValueError(f"feature {label_key!r} of {self.name} is {label!r}, expected a ClassLabel")
        self.class_names = tuple(names)
        try:
            self._records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(
                f"{self.name} is not prepared as array_record; "
                f"convert it once: python -m vit_flax.data.tfrecord {builder.data_dir} --out DIR"
            ) from error
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits) or "none"
            raise ValueError(f"cannot read split {split!r} of {self.name} (splits: {known}): {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            # Not a ValueError, which would not end a for loop.
            raise IndexError(f"{index} is outside 0..{len(self) - 1} of {self!r}")
        record_id = f"{self.name}:{self.split}[{index}]"
        try:
            record = self._records[index]
        except RuntimeError as error:  # of array_record
            raise DecodeError(record_id, f"the record is damaged: {error}") from error
        label = record[self._label_key]
        if self._multi_label:
            label = _multi_hot(label, len(self.class_names))
        return {"image": record[self._image_key], "label": label, "id": record_id}

    def __repr__(self) -> str:
        return f"Tfds({self.name}, split={self.split!r}, {len(self)} examples)"

    def fingerprint(self) -> dict[str, Any]:
        """See `Source`."""
        return fingerprint_of(self)


def digits(*, split: str, data_dir: str | os.PathLike[str] | None = None) -> Tfds:
    """The 1,797 handwritten digits of scikit-learn, written once below `data_dir` and read through TFDS."""
    from vit_flax.data.digits import prepare_digits

    return Tfds(split=split, directory=prepare_digits(data_dir_or_default(data_dir)))


def _open_dataset(dataset: str, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset, data_dir=None if data_dir is None else Path(data_dir).expanduser())
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TFDS knows no data set {dataset!r} and found none of that name in {data_dir=}") from error
    if not builder.info.splits:
        root = Path(builder.data_dir).parents[2 if builder.builder_config else 1]
        raise FileNotFoundError(
            f"{dataset} is not prepared in {builder.data_dir}. TFDS needs TensorFlow to prepare it, once, in any "
            "environment (reading it needs none): pip install tensorflow-cpu tensorflow-datasets && "
            f"tfds build {dataset} --file_format=array_record --data_dir={root}"
        )
    return builder


def _open_directory(directory: str | os.PathLike[str]) -> Any:
    import tensorflow_datasets as tfds

    path = Path(directory).expanduser()
    if not (path / "dataset_info.json").exists():
        raise FileNotFoundError(f"expected a prepared TFDS data set (with dataset_info.json) in {path}")
    return tfds.builder_from_directory(path)


def _multi_hot(classes: Any, num_classes: int) -> np.ndarray:
    label = np.zeros(num_classes, np.uint8)
    label[np.asarray(classes, np.int64)] = 1
    return label


SOURCES: dict[str, Callable[..., Source]] = {
    "arrays": Arrays,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "folder": Folder,
    "hf": HuggingFace,
    "mnist": mnist,
    "records": Records,
    "tfds": Tfds,
}
