"""Image-classification sets of the Hugging Face `datasets` library (an extra dependency)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_flax.data.decode import DecodeError
from vit_flax.data.fingerprint import fingerprint_of


class HuggingFace:
    """A Hugging Face data set, on disk or by name. Needs `pip install datasets`.

    Args:
      split: its split syntax, e.g. "train" or "train[:90%]"; a plain name where the set is a folder.
      dataset: its name ("user/name"), or a folder that `save_to_disk` wrote or that the library reads by itself.
      config: the configuration of a set that has several.
      revision: commit or tag of a set that is read by name; its data may change otherwise.
      image_key: name of the image column.
      label_key: name of the label column.
      class_names: where the column does not say them (it is no ClassLabel): the class of each integer, or the texts.

    Raises:
      ValueError: the library is missing; no such split or column, or no class names.
    """

    def __init__(
        self,
        *,
        split: str,
        dataset: str | os.PathLike[str],
        config: str | None = None,
        revision: str | None = None,
        image_key: str = "image",
        label_key: str = "label",
        class_names: Sequence[str] | None = None,
    ):
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ValueError("the hf source needs one more package: pip install datasets") from error
        table = _open(datasets, dataset, split, config, revision)
        for key in (image_key, label_key):
            if key not in table.features:
                raise ValueError(f"{dataset} has no column {key!r}; it has {sorted(table.features)}")
        if not isinstance(table.features[image_key], datasets.Image):
            raise ValueError(f"column {image_key!r} of {dataset} is {table.features[image_key]}, expected images")
        if class_names is None:
            class_names = getattr(table.features[label_key], "names", None)
        if class_names is None:
            raise ValueError(
                f"column {label_key!r} of {dataset} is {table.features[label_key]}: give class_names=[...]"
            )
        self.name, self.split, self.class_names = str(dataset), split, tuple(class_names)
        self._number = {name: number for number, name in enumerate(self.class_names)}
        self._fingerprint = table._fingerprint
        self._table = table.select_columns([image_key, label_key]).cast_column(image_key, datasets.Image(decode=False))
        self._image_key, self._label_key = image_key, label_key

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[int(index)]
        record_id = f"{self.name}:{self.split}[{index}]"
        image, label = row[self._image_key], row[self._label_key]
        if image is None:
            raise DecodeError(record_id, f"the column {self._image_key!r} is empty in this row")
        data = image["bytes"]
        if data is None:
            data = Path(image["path"]).read_bytes()
        if isinstance(label, str):
            if label not in self._number:
                raise ValueError(f"{record_id} has the label {label!r}, which is none of {self.class_names}")
            label = self._number[label]
        return {"image": data, "label": label, "id": record_id}

    def __repr__(self) -> str:
        return f"HuggingFace({self.name}, split={self.split!r}, {len(self)} examples)"

    def fingerprint(self) -> dict[str, Any]:
        """See `Source`; the digest is the library's own."""
        return fingerprint_of(self, digest=self._fingerprint)


def _open(datasets: Any, dataset: str | os.PathLike[str], split: str, config: str | None, revision: str | None) -> Any:
    path = Path(dataset).expanduser()
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        name = str(path if path.exists() else dataset)
        return datasets.load_dataset(name, config, split=split, revision=revision)
    table = datasets.load_from_disk(path)
    splits = dict(table) if isinstance(table, dict) else {str(table.split or "train"): table}
    if split not in splits:
        raise ValueError(f"no split {split!r} in {path}; it has {sorted(splits)}")
    return splits[split]
