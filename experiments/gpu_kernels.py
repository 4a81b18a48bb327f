"""The kernels of a program for an NVIDIA H200, and what they read and write, found without a GPU.

    pip install 'jax[cuda12]'
    python experiments/gpu_kernels.py --variant B/16 --batch 128 --mode train --top 20

XLA compiles for a card that is described to it, without trying which of several programs is the fastest. Times are not
known; but what is not a product or attention waits for the memory, and its bytes are in the program.
"""

import collections
import math
import os
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies

from vit_flax.benchmark.cases import Case, compile_forward, train_program
from vit_flax.gpu_flags import set_gpu_flags
from vit_flax.log_lines import show_warnings

# As XLA describes an H100, with the memory of an H200 (data sheets: 4.8 TB/s, 141 GB).
CARD = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 141000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id")
SLICES = ("slice", "dynamic-slice", "gather")


class Kernel(NamedTuple):
    """One line of a program: `kind` is "product", "attention" or "other"; `times` it runs."""

    kind: str
    what: str
    num_bytes: int
    times: int


class Line(NamedTuple):
    """An instruction of XLA's text: `%name = shape op(%operand, ...), ...`."""

    name: str
    shape: str
    op: str
    operands: list[str]
    text: str


def kernels(text: str) -> list[Kernel]:
    """The kernels of a compiled program, in order; what a loop holds is there once, with its number of turns."""
    bodies: dict[str, list[Line]] = {}
    for part in re.split(r"\n(?=%|ENTRY )", text):
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(", part):
            bodies["ENTRY" if head[1] else head[2]] = [line for row in part.splitlines()[1:] if (line := _line(row))]
    return list(_kernels("ENTRY", 1, bodies))


def _line(row: str) -> Line | None:
    match = re.match(r"  (?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", row)
    return Line(match[1], match[2], match[3], re.findall(r"%([\w.-]+)", match[4]), row) if match else None


def _kernels(body: str, times: int, bodies: dict[str, list[Line]]) -> Any:
    shapes = {line.name: line.shape for line in bodies[body]}
    for line in bodies[body]:
        inner = re.search(r"(?:body|to_apply|calls)=%?([\w.-]+)", line.text)
        if line.op in ("while", "call", "async-start") and inner:
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line.text)
            yield from _kernels(inner[1], times * int(turns[1] if turns else 1), bodies)
        elif line.op not in FREE and not line.op.endswith("-done"):
            fused = bodies.get(inner[1], []) if inner and line.op == "fusion" else []
            name = re.search(r'op_name="([^"]*)"', line.text)
            shape = re.sub(r"\{[^}]*\}", "", line.shape)
            what = f"{re.sub(r'[.][0-9]+$', '', line.name)} {shape} {name[1] if name else ''}".strip()
            yield Kernel(_kind([line, *fused]), what, _traffic(line, fused, shapes), times)


def _kind(lines: list[Line]) -> str:
    targets = "".join(line.text for line in lines if line.op == "custom-call")
    if "fmha" in targets:
        return "attention"
    return "product" if "matmul" in targets or any(line.op == "dot" for line in lines) else "other"


def _traffic(line: Line, fused: list[Line], shapes: dict[str, str]) -> int:
    """Bytes of the results and operands; of an operand that a fusion only cuts from, those of the cuts.

    Of an array that is updated in place, those of the part.
    """
    total = _bytes(line.shape) + sum(_bytes(shapes[name]) for name in set(line.operands))
    if fused and fused[-1].op == "dynamic-update-slice":
        inside = {inner.name: inner.shape for inner in fused}
        array, part = (_bytes(inside[name]) for name in fused[-1].operands[:2])
        return total + 2 * (part - array)
    for parameter in (inner for inner in fused if inner.op == "parameter"):
        users = [inner for inner in fused if parameter.name in inner.operands]
        if users and all(user.op in SLICES for user in users):
            total += sum(_bytes(user.shape) for user in users) - _bytes(parameter.shape)
    return total


def _bytes(shape: str) -> int:
    found = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"s8\[\d+\]", "", shape))  # s8: scratch memory of cuBLAS
    return sum(BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found)


def compile_for_the_card(case: Case) -> Any:
    """The compiled program of a case; JAX is told that it runs on the card, as far as it is asked while it traces."""
    from jax._src.cudnn import fused_attention_stablehlo as checks

    card = topologies.get_topology_desc("h200", "cuda", target_config=CARD, topology="1x1x1").devices[0]
    place = jax.sharding.SingleDeviceSharding(card)
    jax.default_backend = lambda: "gpu"
    jax.local_devices = lambda *_, **__: [SimpleNamespace(compute_capability="9.0")]
    checks.check_cudnn_version = lambda: 91000
    checks.check_compute_capability = lambda least: float(least) <= 9.0
    checks.is_cuda_compute_capability_equal = lambda it: it == "9.0"

    image = (case.batch, case.image_px, case.image_px, 3)
    if case.mode == "forward":
        program, model = compile_forward(case), case.model()
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(image), train=False)["params"])
        arguments: Any = (params, jax.ShapeDtypeStruct(image, jnp.float32))
    else:
        make, program = train_program(case)
        batch = {"image": (image, jnp.uint8), "label": (image[:1], jnp.int32), "mask": (image[:1], jnp.bool_)}
        arguments = (jax.eval_shape(make), {name: jax.ShapeDtypeStruct(*it) for name, it in batch.items()})
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    lowered = program.trace(*placed).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})


def main(_: list[str]) -> None:
    """Compiles, and prints the sums of each kind and the largest of the others."""
    set_gpu_flags()
    show_warnings()
    given = flags.FLAGS
    case = Case(given.variant, given.batch, given.mode, given.dtype, layers=given.layers, remat=given.remat)
    found = kernels(compile_for_the_card(case).as_text())
    for kind in ("product", "attention", "other"):
        those = [kernel for kernel in found if kernel.kind == kind]
        total = sum(kernel.num_bytes * kernel.times for kernel in those)
        print(f"{kind:10} {sum(kernel.times for kernel in those):6} kernels {total / 2**30:8.2f} GiB")
    largest: collections.Counter[str] = collections.Counter()
    for kernel in found:
        if kernel.kind == "other":
            largest[kernel.what] += kernel.num_bytes * kernel.times
    for what, num_bytes in largest.most_common(given.top):
        print(f"{num_bytes / 2**30:8.3f} GiB  {what}")


if __name__ == "__main__":
    flags.DEFINE_string("variant", "B/16", "Size, such as S/16.")
    flags.DEFINE_integer("batch", 128, "Images.", lower_bound=1)
    flags.DEFINE_enum("mode", "train", ["forward", "train"], "What is compiled.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of activations and products.")
    flags.DEFINE_string("layers", "auto", "auto, scan, loop, or a number of blocks per turn of the scan.")
    flags.DEFINE_string("remat", "auto", "auto, none, dots, full.")
    flags.DEFINE_integer("top", 0, "How many of the other kernels to list.", lower_bound=0)
    app.run(main)
