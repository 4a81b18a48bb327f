"""What became of every tensor of a checkpoint and every parameter of the model."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]

MAX_LINES = 20  # of tensors, and as many of parameters, in an error
MAX_PATTERNS = 6  # in a suggested `ignore`, before names are shortened


@dataclass(frozen=True)
class Report:
    """The account of one load; `print(report)` is meant to be read.

    Attributes:
      path: of the checkpoint.
      family: that it was read as.
      posemb_resize: how its reference implementation resizes the position table (a key of `resample.METHODS`).
      patch_resize: the same for the patch embedding.
      loaded: our parameters that came from the file, with their shapes.
      resampled: those of them that were changed on the way: path -> (what was done, old shape, new shape).
      reinitialised: our parameters that did not come from the file: path -> (why, shape).
      unused: tensors of the file that went nowhere: key -> (why, shape).
      missing: our parameters that the file lacked and `ignore` excused; they are in `reinitialised` too.
    """

    path: str
    family: str
    posemb_resize: str
    patch_resize: str
    loaded: Mapping[str, Shape]
    resampled: Mapping[str, tuple[str, Shape, Shape]] = field(default_factory=dict)
    reinitialised: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)
    unused: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)
    missing: Mapping[str, Shape] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.family}, {len(self.loaded)} parameters loaded"]
        lines += [
            f"  resampled      {p} {list(old)} -> {list(new)}: {how}" for p, (how, old, new) in self.resampled.items()
        ]
        lines += [f"  reinitialised  {p} {list(shape)}: {why}" for p, (why, shape) in self.reinitialised.items()]
        lines += [f"  missing        {p} {list(shape)}: excused by ignore" for p, shape in self.missing.items()]
        lines += [f"  unused         {k} {list(shape)}: {why}" for k, (why, shape) in self.unused.items()]
        return "\n".join(lines)


def unexplained(
    path: str,
    unused: Mapping[str, Shape],
    missing: Mapping[str, tuple[str, Shape]],
    explained: Iterable[str] = (),
) -> ValueError:
    """The error for tensors without a parameter and parameters without a tensor, with the nearest names.

    Args:
      path: of the checkpoint.
      unused: key in the file -> shape.
      missing: path in the model -> (the name that was looked for, shape).
      explained: keys and paths that are in order, which the suggested `ignore` must not touch.
    """
    wanted = [name for name, _ in missing.values()]
    lines = [
        f"{path}: {len(unused)} tensors of the file have no place in the model, {len(missing)} parameters no tensor."
    ]
    for key, shape in list(unused.items())[:MAX_LINES]:
        lines.append(f"  + in the file only:  {key} {list(shape)}{nearest(key, wanted)}")
    for name, (theirs, shape) in list(missing.items())[:MAX_LINES]:
        lines.append(f"  - in the model only: {name} {list(shape)}, looked for as {theirs}{nearest(theirs, unused)}")
    if more := max(len(unused) - MAX_LINES, 0) + max(len(missing) - MAX_LINES, 0):
        lines.append(f"  ... {more} more")
    patterns = _patterns([*unused, *missing], list(explained))
    lines.append(f"Wrong family or wrong fields? To go on without them: ignore={patterns}")
    return ValueError("\n".join(lines))


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint with the most similar of some names, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.8)
    return f" (nearest: {close[0]})" if close else ""


def _patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Regular expressions that match the names and none of the others: one per name, or short ones if there are many.

    A short one is the first parts of a name, as few as tell it from the others, and stands for any number if it can.
    """
    if len(names) <= MAX_PATTERNS:
        return [f"^{re.escape(name)}$" for name in names]
    found: list[str] = []
    for name in names:
        if not any(re.search(pattern, name) for pattern in found):
            found.append(next(p for p in _ever_longer(name) if not any(re.search(p, other) for other in others)))
    return found


def _ever_longer(name: str) -> Iterator[str]:
    parts = re.split(r"(?<=[./])", name)
    for count in range(1, len(parts)):
        start = "^" + re.escape("".join(parts[:count]))
        yield from (re.sub(r"\d+", r"\\d+", start), start)
    yield from (re.sub(r"\d+", r"\\d+", f"^{re.escape(name)}$"), f"^{re.escape(name)}$")
