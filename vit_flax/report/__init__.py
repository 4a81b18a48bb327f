"""`report.html`: a whole run in one file that needs no network, from what the run wrote into its workdir.

python -m vit_flax.report --workdir runs/digits
"""

import json
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from vit_flax.files import write_atomically
from vit_flax.report import sections


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html` into the workdir, finished run or not, and returns its path.

    Raises: FileNotFoundError: the folder lacks a file that every run writes; names it. ValueError: one is damaged.
    """
    folder = Path(workdir).expanduser().absolute()
    for name in ("config.json", "facts.json", "metrics.jsonl"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"There is no {name} in {folder}: is it the --workdir of a run that has started?")
    record, facts = (_read(folder / name) for name in ("config.json", "facts.json"))
    lines = whole_lines(folder / "metrics.jsonl")
    evals = {path.stem: _read(path) for path in sorted((folder / "evals").glob("*.json"))}
    last_step = max((line["step"] for line in lines), default=0)
    body = [
        sections.header(folder.name, facts, record, last_step),
        sections.tiles(evals, lines),
        sections.learning(lines),
        sections.results(lines),
        *(sections.evaluation(name, details, folder / "pictures") for name, details in evals.items()),
        sections.training_batch(folder / "pictures"),
        sections.engine(lines),
        sections.origins(record, facts),
    ]
    path = folder / "report.html"
    write_atomically(path, page(f"{folder.name}: vit_flax run", "\n".join(body)))
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): move it away, and start the run again.") from None


def page(title: str, body: str) -> str:
    """A page that needs no network: style and script are in it."""
    style, script = (
        resources.files("vit_flax.report").joinpath(f"report.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main>\n<script>\n{script}</script></body></html>\n"
    )


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; the last one may be half written, as the run may still be going on."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
