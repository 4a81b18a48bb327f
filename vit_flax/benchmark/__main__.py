"""Images per second of the model on this machine, against the machine's own matrix product.

    python -m vit_flax.benchmark --variant S/16 --batch 8 --mode forward            # one case: one JSON line
    python -m vit_flax.benchmark --mode forward,train --dtype float32,bfloat16      # several: lines and a table
    python -m vit_flax.benchmark --mode forward,train --dtype bfloat16 --peers      # beside timm, transformers, Keras
    python -m vit_flax.benchmark --remat none,dots,full --mode train                # step time and memory of a choice
    python -m vit_flax.benchmark --variant B/16 --mode train --find-batch           # the largest batch that fits
    python -m vit_flax.benchmark --compile-depths 12,48                             # compile time over depth

Every flag that takes a list makes a case of each combination. Those of one variant, mode and dtype take turns with the
peers and the matrix products, round after round, so that a machine that other work shares hits all alike: trust the
ratios more than the rates. A line is printed as soon as it is known; what does not fit into the memory is left out.
"""

import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from vit_flax.benchmark import measure, report
from vit_flax.benchmark.cases import (
    MODES,
    Case,
    Ours,
    compile_forward,
    left_out_if_too_large,
    program_bytes,
    train_program,
)
from vit_flax.benchmark.peers import Peer, installed
from vit_flax.gpu_flags import set_gpu_flags
from vit_flax.log_lines import show_warnings

_VARIANT = flags.DEFINE_list("variant", ["S/16"], "Sizes, such as S/16,B/16.")
_BATCH = flags.DEFINE_list("batch", ["8"], "Images per step.")
_MODE = flags.DEFINE_list("mode", ["forward"], "forward, train (the step alone), loop (with batches from the host).")
_DTYPE = flags.DEFINE_list("dtype", ["float32"], "float32, bfloat16.")
_ATTENTION = flags.DEFINE_list("attention", ["auto"], "auto, xla, cudnn, cpu.")
_LAYERS = flags.DEFINE_list("layers", ["auto"], "auto, scan, loop, or a number of blocks per turn of the scan.")
_REMAT = flags.DEFINE_list("remat", ["auto"], "auto, none, dots, full, offload.")
_IMAGE_PX = flags.DEFINE_integer("image_px", 224, "Side of the images.", lower_bound=1)
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Classes.", lower_bound=1)
_PEERS = flags.DEFINE_bool("peers", False, "Measure Flax's layers, timm, transformers, Keras too, where installed.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each case; the median is reported.", lower_bound=1)
_MIN_SECONDS = flags.DEFINE_float("min_seconds", 0.5, "A turn does as many steps as take so long.", lower_bound=0)
_FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Find the largest batch that fits, of each combination.")
_COMPILE_DEPTHS = flags.DEFINE_list("compile_depths", [], "Measure the compile time of these depths instead.")


def main(argv: list[str]) -> None:
    """Measures what the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    set_gpu_flags()
    show_warnings()  # JAX reports every backend that is not there at INFO
    if _PEERS.value:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need some of the GPU, too
    try:
        cases = cases_of_flags()
        for case in cases:
            case.check()
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if _COMPILE_DEPTHS.value:
        compile_times(cases)
    elif _FIND_BATCH.value:
        for case in cases:
            print(json.dumps(find_batch(case)), flush=True)
    else:
        compare(cases)


def cases_of_flags() -> list[Case]:
    """Every combination of the lists. Raises ValueError for a word that is not a choice."""
    for mode in _MODE.value:
        if mode not in MODES:
            raise ValueError(f"--mode={mode} is unknown: expected {', '.join(MODES)}.")
    for dtype in _DTYPE.value:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype={dtype} is unknown: expected float32 or bfloat16.")
    for flag, words in ((_LAYERS, ("auto", "scan", "loop")), (_BATCH, ()), (_COMPILE_DEPTHS, ())):
        for value in flag.value:
            if value not in words and not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"--{flag.name}={value}: expected {', '.join([*words, 'a positive whole number'])}.")
    product = itertools.product(
        _VARIANT.value, _BATCH.value, _MODE.value, _DTYPE.value, _ATTENTION.value, _LAYERS.value, _REMAT.value
    )
    return [
        Case(v, int(b), m, d, a, s, r, image_px=_IMAGE_PX.value, num_classes=_NUM_CLASSES.value)
        for v, b, m, d, a, s, r in product
        if m != "forward" or r == _REMAT.value[0]  # without a backward pass `remat` does nothing: one word will do
    ]


def compare(cases: list[Case]) -> None:
    """Measures the cases, those of one variant, mode and dtype together; a table at the end if there are several."""
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.variant, case.mode, case.dtype), []).append(case)
    rows = [row for group in groups.values() for row in compare_group(group)]
    if len(rows) > 1:
        print("\nover first: speed over the first line of the same variant, mode and dtype.\n")
        print(report.table(rows))


def compare_group(cases: list[Case]) -> list[dict[str, Any]]:
    """Lets the cases take turns with their peers and the matrix products; prints and returns a line for each."""
    ours: dict[Case, Ours] = {}
    for case in cases:
        with measure.left_out():
            ours[case] = Ours(case)
    peers = start_peers(cases) if _PEERS.value else {}
    runners: dict[Case, Any] = {**ours, **peers}
    model = cases[0].model()
    tokens = max(case.batch * ((case.image_px // model.patch_shape[0]) ** 2 + 1) for case in cases)
    by_name = {case.name: runner for case, runner in runners.items()}
    try:
        matmuls = measure.ceilings({cases[0].dtype}, tokens, model.width, model.mlp_dim)
        seconds = measure.take_turns({**by_name, **matmuls}, rounds=_ROUNDS.value, min_seconds=_MIN_SECONDS.value)
    finally:
        for peer in peers.values():
            peer.close()
    ceiling = max(matmul.flops / statistics.median(seconds[name]) / 1e9 for name, matmul in matmuls.items())
    measured = [case for case in runners if case.name in seconds]
    more = {"peak_mib": round(measure.peak_memory_bytes() / report.MIB, 1), **measure.machine()}
    rows = [
        report.row(
            case,
            seconds[case.name],
            ceiling_gflops=ceiling,
            versus_first=measure.ratio(seconds[measured[0].name], seconds[case.name]),
            compile_seconds=runners[case].compile_seconds,
            memory_bytes=ours[case].memory_bytes() if case in ours else None,
        )
        for case in measured
    ]
    for row in rows:
        print(json.dumps({**row, **more}), flush=True)
    return rows


def start_peers(cases: list[Case]) -> dict[Case, Peer]:
    """The peers of every (variant, batch, mode, dtype); one that fails is left out with a message."""
    peers: dict[Case, Peer] = {}
    for name in installed():
        for case in cases:
            # What only we can choose is set to one value, so that each peer is measured once.
            peer = dataclasses.replace(case, library=name, attention="auto", layers="auto", remat="auto")
            if peer not in peers and case.mode != "loop":
                with measure.left_out():
                    peers[peer] = Peer(peer)
    return peers


def compile_times(cases: list[Case]) -> None:
    """Seconds to trace and compile at each depth, and the ratio to the first depth; without the compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    for case in cases:
        first = None
        for depth in [int(d) for d in _COMPILE_DEPTHS.value]:
            times = []
            for _ in range(3):
                deep = dataclasses.replace(case, depth=depth)
                jax.clear_caches()
                lower = lowering(deep)
                since = time.perf_counter()
                lower().compile()
                times.append(time.perf_counter() - since)
            seconds = min(times)
            first = first or seconds
            found = {"case": deep.name, "compile_seconds": round(seconds, 2), "over_first": round(seconds / first, 3)}
            print(json.dumps(found), flush=True)


def lowering(case: Case) -> Callable[[], Any]:
    """A function that traces and lowers the case's program from shapes alone."""
    pixels = (case.batch, case.image_px, case.image_px, 3)
    init, step = train_program(case)
    state = jax.eval_shape(init)
    if case.mode == "forward":
        return lambda: compile_forward(case).lower(state.params, jax.ShapeDtypeStruct(pixels, jnp.float32))
    batch = {
        "image": jax.ShapeDtypeStruct(pixels, jnp.uint8),
        "label": jax.ShapeDtypeStruct(pixels[:1], jnp.int32),
        "mask": jax.ShapeDtypeStruct(pixels[:1], jnp.bool_),
    }
    return lambda: step.lower(state, batch)


def find_batch(case: Case) -> dict[str, Any]:
    """The largest batch whose program fits into the memory that is free, to within an eighth of it.

    On the CPU nothing is run: the compiler says what a program needs. On other devices the batch takes one step.
    """
    limit, needs = measure.free_memory_bytes(), {}

    def fits(batch: int) -> bool:
        sized = dataclasses.replace(case, batch=batch)
        try:
            with left_out_if_too_large(sized):
                needs[batch] = program_bytes(lowering(sized)().compile())
                if needs[batch] <= limit and jax.default_backend() != "cpu":
                    Ours(sized).run(1)
        except measure.LeftOut:
            return False
        return needs[batch] <= limit

    batch = largest_that(fits, case.batch)
    return {
        "case": dataclasses.replace(case, batch=batch).name,
        "largest_batch": batch,
        "program_mib": round(needs[batch] / 2**20, 1) if batch else None,
        "limit_mib": round(limit / 2**20, 1),
    }


def largest_that(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, to within an eighth of it; 0 if none does. Doubles, then halves the interval."""
    low, high, guess = 0, None, start
    while high is None or high - low > max(1, low // 8):
        if fits(guess):
            low = guess
        else:
            high = guess
        guess = 2 * low if high is None else (low + high) // 2
    return low


def with_underscores(argv: list[str]) -> list[str]:
    """`--find-batch` as `--find_batch`: absl knows one spelling."""

    def spelled(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument

    return [spelled(argument) for argument in argv]


if __name__ == "__main__":
    app.run(main, argv=with_underscores(sys.argv))
