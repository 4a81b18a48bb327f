"""Rows of figures, and a Markdown table of them."""

import statistics
from typing import Any

from vit_flax.benchmark import measure
from vit_flax.benchmark.cases import Case

MIB = 2**20


def row(
    case: Case,
    seconds: list[float],
    *,
    ceiling_gflops: float,
    versus_first: float,
    compile_seconds: float,
    memory_bytes: int | None,
) -> dict[str, Any]:
    """One line of the report.

    Args:
      case: what was measured.
      seconds: per step, one entry per round.
      ceiling_gflops: the machine's own matmul rate in this dtype, measured in the same rounds.
      versus_first: speed over that of the first case, median of the rounds.
      compile_seconds: of tracing and compiling; of a peer, of building the model and its first step.
      memory_bytes: of the program; None where the library does not say.
    """
    step = statistics.median(seconds)
    gflops = case.flops() / step / 1e9
    sheet = measure.data_sheet_gflops(case.dtype)
    return {
        "library": case.library,
        "variant": case.variant if case.depth is None else f"{case.variant} depth {case.depth}",
        "batch": case.batch,
        "mode": case.mode,
        "dtype": case.dtype,
        "attention": case.attention if case.library == "vit_flax" else None,
        "layers": case.layers if case.library == "vit_flax" else None,
        "remat": case.remat if case.library == "vit_flax" else None,
        "image_px": case.image_px,
        "images_per_second": round(case.batch / step, 2),
        "low": round(case.batch / max(seconds), 2),
        "high": round(case.batch / min(seconds), 2),
        "rounds": len(seconds),
        "gflops": round(gflops, 1),
        "matmul_gflops": round(ceiling_gflops, 1),
        "fraction_of_matmul": round(gflops / ceiling_gflops, 3),
        "fraction_of_data_sheet": None if sheet is None else round(gflops / sheet, 3),
        "speed_over_first": round(versus_first, 3),
        "compile_seconds": round(compile_seconds, 2),
        "program_mib": None if memory_bytes is None else round(memory_bytes / MIB, 1),
    }


COLUMNS = {  # heading -> the figures in it
    "library": "{library}",
    "variant": "{variant}",
    "batch": "{batch}",
    "mode": "{mode}",
    "dtype": "{dtype}",
    "attention, layers, remat": "{attention}, {layers}, {remat}",
    "images / s": "{images_per_second}",
    "low - high": "{low} - {high}",
    "of matmul": "{fraction_of_matmul}",
    "of data sheet": "{fraction_of_data_sheet}",
    "over first": "{speed_over_first}",
    "compile s": "{compile_seconds}",
    "MiB": "{program_mib}",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; columns that would be empty are left out."""
    cells = [
        [form.format(**r).replace("None, None, None", "").replace("None", "") for form in COLUMNS.values()]
        for r in rows
    ]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
    heads = list(COLUMNS)
    lines = [[heads[i] for i in used], ["---"] * len(used), *([line[i] for i in used] for line in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
