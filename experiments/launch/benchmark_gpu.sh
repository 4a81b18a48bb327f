#!/usr/bin/env bash
# What one GPU does: the goals first, then the choices, then the rest. Lines of JSON as they come, tables in between; what
# does not fit into its memory is left out. Each command can be run by itself: a program takes 20 to 30 seconds to compile,
# the whole script, not run in one piece so far, about 15 minutes. Needs jax[cuda12], flax, optax, numpy and absl-py; torch,
# timm and transformers where the peers are wanted.
#
#   experiments/launch/benchmark_gpu.sh 2>&1 | tee gpu.txt
set -uo pipefail
cd "$(dirname "$0")/../.."
run() {
  printf '\n=== %s %s\n' "${XLA_FLAGS:-}" "$*"
  "${PYTHON:-.venv/bin/python}" -m vit_flax.benchmark --dtype bfloat16 --rounds 5 "$@"
}
run --variant B/16 --batch 128 --mode train,forward --peers                                # the ratios to others
run --variant B/16 --batch 256 --mode train --layers auto,scan,12,loop --remat none,dots   # the choices
run --variant B/16 --batch 256 --mode train,forward --attention auto,xla
run --variant S/16 --batch 512 --mode train,forward
run --variant L/16 --batch 128 --mode train,forward --layers auto,12 --remat none,dots
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true" run --variant B/16 --batch 256 --mode train
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=true" run --variant B/16 --batch 256 --mode train,forward  # ours: false
run --variant B/16 --mode train --find-batch
