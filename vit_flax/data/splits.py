"""Parts of a data set: TFDS's split syntax for sources that are not TFDS's, and a split by hash where none is given."""

import hashlib
from collections.abc import Mapping


def split_ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Resolves TFDS split syntax, e.g. "train", "train[:98%]", "train[10:20]+test[:5]".

    Args:
      split: what is wanted.
      sizes: the number of examples of each whole split.

    Returns: (split name, start, stop) of each part.

    Raises:
      ValueError: not the syntax, no such split, or more than there is.
    """
    if split in sizes:
        return [(split, 0, sizes[split])]
    import tensorflow_datasets as tfds

    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except ValueError as error:
        known = ", ".join(f"{name} ({size} examples)" for name, size in sizes.items())
        raise ValueError(f"cannot read split {split!r} of {known}: {error}") from error
    ranges = [
        (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to) for part in parts
    ]
    return [(name, start, max(start, stop)) for name, start, stop in ranges]


def is_held_out(key: str, percent: float) -> bool:
    """Whether the example `key` belongs to the held-out part.

    It depends on nothing but the key, so that adding pictures moves none from one part to the other.
    """
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64
