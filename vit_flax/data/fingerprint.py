"""What says in a checkpoint which data a run is trained on."""

from typing import Any


def fingerprint_of(source: Any, **more: str) -> dict[str, Any]:
    """The entries that every source has, as JSON values.

    Args:
      source: with a name, a split, a length and class names; see `sources.Source`.
      **more: entries of its own, such as a digest; one may replace `name`.
    """
    common = {"name": source.name, "split": source.split, "num_examples": len(source)}
    return {**common, "class_names": list(source.class_names), **more}
