"""Plain files: metrics.jsonl and pictures, which the report reads, and tables in CSV.

A run that goes on from a checkpoint takes back what an earlier life wrote beyond its step, and repeats nothing of what
that wrote at its step, so that the files are what an uninterrupted run would have written.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_flax.files import write_atomically


class Files:
    """`metrics.jsonl`, one object a line, and the newest of each picture as `pictures/<name>.png`.

    Args:
      workdir: of the run.
      start_step: the step that the run goes on from.
    """

    def __init__(self, *, workdir: Path, start_step: int):
        path = workdir / "metrics.jsonl"
        kept: list[str] = []
        if path.exists():
            kept = _lines_until(path, start_step)
            write_atomically(path, "".join(kept))
        self._there = {line for line in kept if json.loads(line)["step"] == start_step}
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self._pictures = workdir / "pictures"

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes a line; not again what a life wrote that was killed before its checkpoint said so."""
        if (line := json.dumps({"step": step, **values}) + "\n") not in self._there:
            self._file.write(line)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture over the one before."""
        path = self._pictures / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    def finish(self, results: Mapping[str, float]) -> None:
        """Nothing: every number is there already."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Csv:
    """`csv/<first part of the name>.csv`, such as train.csv: a column per number, a row per step.

    Args:
      workdir: of the run.
      start_step: the step that the run goes on from.
    """

    def __init__(self, *, workdir: Path, start_step: int):
        self._folder = workdir / "csv"
        self._folder.mkdir(exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        self._there: set[tuple[str, int]] = set()  # tables that have a row of `start_step`
        for path in sorted(self._folder.glob("*.csv")):
            columns, *rows = _whole_rows(path) or [["step"]]
            self._columns[path.stem] = columns
            self._rewrite(path.stem, [row for row in rows if row[0].isdecimal() and int(row[0]) <= start_step])
            self._there |= {(path.stem, start_step) for row in rows if row[0] == str(start_step)}

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds a row to each table that has a number here; None is an empty cell."""
        tables: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            table, _, column = name.partition("/")
            tables.setdefault(table, {"step": step})[column] = value
        for table, row in tables.items():
            if (table, step) not in self._there:
                self._add(table, row)

    def _add(self, table: str, row: dict[str, Any]) -> None:
        path = self._folder / f"{table}.csv"
        columns = self._columns.setdefault(table, [])
        if new := [column for column in row if column not in columns]:
            old_rows = _whole_rows(path)[1:] if path.exists() else []
            columns.extend(new)
            self._rewrite(table, [cells + [""] * (len(columns) - len(cells)) for cells in old_rows])
        with open(path, "a", newline="", encoding="utf-8") as file:
            file.write(_as_text([[row.get(column) for column in columns]]))

    def _rewrite(self, table: str, rows: Iterable[Iterable[Any]]) -> None:
        write_atomically(self._folder / f"{table}.csv", _as_text([self._columns[table], *rows]))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Nothing: a table has no pictures."""

    def finish(self, results: Mapping[str, float]) -> None:
        """Nothing: every number is there already."""

    def close(self) -> None:
        """Nothing: every row is closed at once."""


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file up to a step; a line cut short by a kill is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _whole_rows(path: Path) -> list[list[str]]:
    """Header and rows of a table; a last row cut short by a kill is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.reader(io.StringIO(whole)) if row]


def _as_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
