"""What `experiments/gpu_kernels.py` reads out of a program that XLA compiled for a GPU."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "experiments" / "gpu_kernels.py"

# Abbreviated by hand: a product that cuBLAS adds a bias to, one of a layer cut out of a stack, attention, a fusion that
# reads one row of an operand, and a loop of three turns.
PROGRAM = """HloModule jit_f, entry_computation_layout={()->f32[]}

%cut (a: bf16[4,8], stack: bf16[12,8,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %stack = bf16[12,8,8]{2,1,0} parameter(1)
  %layer = bf16[1,8,8]{2,1,0} slice(%stack), slice={[3:4], [0:8], [0:8]}
  %w = bf16[8,8]{1,0} bitcast(%layer)
  ROOT %y = (bf16[4,8]{1,0}, s8[1000]{0}) custom-call(%a, %w), custom_call_target="__cublas$lt$matmul"
}

%row (p: f32[4,8]) -> f32[8] {
  %p = f32[4,8]{1,0} parameter(0)
  %r = f32[1,8]{1,0} slice(%p), slice={[0:1], [0:8]}
  ROOT %b = f32[8]{0} bitcast(%r)
}

%put (old: f32[12,8], new: f32[1,8]) -> f32[12,8] {
  %old = f32[12,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %put.1 = f32[12,8]{1,0} dynamic-update-slice(%old, %new, %zero, %zero)
}

%turn (s: (f32[4,8])) -> (f32[4,8]) {
  %s = (f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=0
  %c = f32[4,8]{1,0} copy(%x), metadata={op_name="jit(f)/while/body/copy"}
  ROOT %t = (f32[4,8]{1,0}) tuple(%c)
}

ENTRY %main (x: bf16[4,8], k: bf16[8,8], b: bf16[8], stack: bf16[12,8,8], f: f32[4,8]) -> f32[8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %k = bf16[8,8]{1,0} parameter(1)
  %b = bf16[8]{0} parameter(2)
  %stack.1 = bf16[12,8,8]{2,1,0} parameter(3)
  %f = f32[4,8]{1,0} parameter(4)
  %stack.2 = f32[12,8]{1,0} parameter(5)
  %f.1 = f32[1,8]{1,0} parameter(6)
  %dot.1 = (bf16[4,8]{1,0}, s8[4194304]{0}) custom-call(%x, %k, %b), custom_call_target="__cublas$lt$matmul"
  %of_layer = bf16[4,8]{1,0} fusion(%x, %stack.1), kind=kCustom, calls=%cut
  %att = bf16[4,8]{1,0} custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  %init = (f32[4,8]{1,0}) tuple(%f)
  %loop = (f32[4,8]{1,0}) while(%init), condition=%c, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
  %stacked = f32[12,8]{1,0} fusion(%stack.2, %f.1), kind=kLoop, calls=%put
  ROOT %fusion.7 = f32[8]{0} fusion(%f), kind=kLoop, calls=%row, metadata={op_name="jit(f)/norm"}
}
"""


def test_kinds_bytes_and_turns():
    kernels = runpy.run_path(str(SCRIPT))["kernels"]
    x, kernel, bias = 4 * 8 * 2, 8 * 8 * 2, 8 * 2
    assert [tuple(kernel) for kernel in kernels(PROGRAM)] == [
        ("product", "dot (bf16[4,8], s8[4194304])", x + kernel + bias + x, 1),
        ("product", "of_layer bf16[4,8]", x + kernel + x, 1),
        ("attention", "att bf16[4,8]", x + x, 1),
        ("other", "c f32[4,8] jit(f)/while/body/copy", 2 * 4 * 8 * 4, 3),
        ("other", "stacked f32[12,8]", 3 * 8 * 4, 1),
        ("other", "fusion f32[8] jit(f)/norm", 8 * 4 + 8 * 4, 1),
    ]
