#!/usr/bin/env bash
# One host, all of its GPUs (or TPU chips), one process: nothing to say but the mesh.
#
#   experiments/launch/one_host.sh configs/digits.py runs/digits --config.mesh.fsdp=8
#
# To leave GPUs out: CUDA_VISIBLE_DEVICES=0,1,2,3. Exit code 75: stopped by a signal and saved; the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# -lt 2 ]; then echo "usage: $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2; exit 1; fi
config=$1 workdir=$2
shift 2
exec "${PYTHON:-.venv/bin/python}" -m vit_flax.main --config "$config" --workdir "$workdir" "$@"
