"""python -m vit_flax.report --workdir runs/digits."""

import sys

from absl import app, flags

from vit_flax.report import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, finished or not.")


def main(argv: list[str]) -> None:
    """Writes the report and says where."""
    if len(argv) > 1 or not _WORKDIR.value:
        print("error: --workdir is needed: the folder of a run. Nothing else is taken.", file=sys.stderr)
        sys.exit(1)
    try:
        print(write_report(_WORKDIR.value))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
