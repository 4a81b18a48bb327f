"""Lists every record of a source that training would stop at.

    python -m vit_flax.data.check --source folder root=~/pictures --splits train val

Decodes every picture and checks every label. One line per bad record on standard output; exit status 1 if there is one.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from vit_flax.data import workers
from vit_flax.data.decode import open_picture
from vit_flax.data.read import checked_label
from vit_flax.data.sources import Source, make_source, parse_source
from vit_flax.log_lines import show_warnings


@dataclasses.dataclass
class Report:
    """What `check` found.

    Attributes:
      problems: one line per bad record, in the order of the source.
      num_examples: how many records were read.
      per_class: {class: how many good records}; for multi-label data, how many have it.
      sizes: {(width, height) in pixels: how many good pictures}.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    num_examples: int = 0
    per_class: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sizes: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)


def check(source: Source) -> Iterator[Report]:
    """Reads and decodes every record of a source; yields the growing report from time to time, and at the end."""
    report = Report()
    with concurrent.futures.ThreadPoolExecutor(min(workers.num_cores(), workers.MAX_THREADS)) as pool:
        for start in range(0, len(source), 1024):  # a bounded number of results in memory
            rows = range(start, min(start + 1024, len(source)))
            for problem, classes, size in pool.map(lambda row: _check_record(source, row), rows):
                _add(report, problem, classes, size)
            yield report


def _check_record(source: Source, row: int) -> tuple[str | None, list[str], tuple[int, int]]:
    try:
        example = source[row]
        label = checked_label(example, len(source.class_names))
        picture = open_picture(example["image"], example["id"])
        picture.load()
    except Exception as error:  # whatever it is, training would stop here
        return str(error) if str(error) else f"record {row}: {error!r}", [], (0, 0)
    numbers = label.nonzero()[0].tolist() if label.ndim else [int(label)]
    return None, [source.class_names[number] for number in numbers], picture.size


def _add(report: Report, problem: str | None, classes: list[str], size: tuple[int, int]) -> None:
    report.num_examples += 1
    if problem is not None:
        report.problems.append(problem)
        return
    report.per_class.update(classes)
    report.sizes[size] += 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    from rich.console import Console
    from rich.progress import Progress

    parser = argparse.ArgumentParser(
        prog="python -m vit_flax.data.check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--source", nargs="+", required=True, metavar=("NAME", "KEY=VALUE"), help="as in a config")
    parser.add_argument("--splits", nargs="+", required=True, help="the splits to read")
    arguments = parser.parse_args(argv)
    try:
        source = parse_source(arguments.source)
        sources = [make_source(split=split, **source) for split in arguments.splits]
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_bad = 0
    for split, opened in zip(arguments.splits, sources):
        report, interrupted = Report(), False
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(split, total=len(opened))
            try:
                for report in check(opened):
                    progress.update(task, completed=report.num_examples)
            except KeyboardInterrupt:
                interrupted = True
        # Not before: beside the bar, what is printed goes where the bar is, even if standard output is a file.
        print(*report.problems, _summary(split, opened, report), sep="\n")
        if interrupted:
            print(f"interrupted after {report.num_examples} of {len(opened)} records of {split}", file=sys.stderr)
            return 130
        num_bad += len(report.problems)
    return 1 if num_bad else 0


def _summary(split: str, source: Source, report: Report) -> str:
    counts = [report.per_class[name] for name in source.class_names]
    summary = (
        f"{split}: {report.num_examples} records, {len(report.problems)} bad; {len(counts)} classes of {min(counts)} "
        f"to {max(counts)} ({_names(source.class_names)})"
    )
    if not report.sizes:  # none could be decoded
        return summary
    extremes = min(report.sizes, key=min), max(report.sizes, key=math.prod)
    smallest, largest = ("x".join(map(str, size)) for size in extremes)
    short_sides = [min(size) for size in report.sizes.elements()]
    low, median, high = np.quantile(short_sides, (0.1, 0.5, 0.9), method="nearest").tolist()
    return (
        f"{summary}; pictures from {smallest} to {largest} px, "
        f"short side {median} px in the median, {low} to {high} in the middle 80 %"
    )


def _names(class_names: Sequence[str], most: int = 10) -> str:
    more = len(class_names) - most
    return ", ".join(class_names[:most]) + (f" and {more} more" if more > 0 else "")


if __name__ == "__main__":
    show_warnings()
    sys.exit(main())
