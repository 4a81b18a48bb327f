"""Executes notebooks top to bottom: python experiments/notebooks/execute.py [--out FOLDER] [NAME.py ...]

The text form (`NAME.py`) is what is edited; `--pair` writes the `NAME.ipynb` that Colab opens, without outputs.
Needs the extra [notebooks].
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main() -> int:
    """Returns 1 if a notebook raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="text forms; all of this folder where none is given")
    parser.add_argument("--pair", action="store_true", help="only write the .ipynb files")
    parser.add_argument("--out", type=Path, help="folder for the executed notebooks")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.notebooks or sorted(HERE.glob("[0-9]*.py")):
        notebook = jupytext.read(path)
        if arguments.pair:
            path.with_suffix(".ipynb").write_text(paired(path))
            continue
        since = time.perf_counter()
        client = NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
        )
        try:
            client.execute()
            print(f"{path.name}: {time.perf_counter() - since:.0f} s", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{path.name}: {error}", file=sys.stderr, flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, arguments.out / f"{path.stem}.ipynb")
    return int(failed > 0)


def paired(path: Path) -> str:
    """The notebook of a text form, without outputs and with cell names that do not change from run to run."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return jupytext.writes(notebook, fmt="ipynb")


if __name__ == "__main__":
    sys.exit(main())
