#!/usr/bin/env bash
# A TPU pod slice: one process per host, on all hosts at once.
#
#   TPU=my-slice ZONE=us-west4-a experiments/launch/tpu_pod.sh configs/digits.py /mnt/shared/digits --config.mesh.fsdp=16
#
# Once, before:
#   gcloud compute tpus tpu-vm create my-slice --zone us-west4-a --accelerator-type v5litepod-16 \
#     --version v2-alpha-tpuv5-lite
#   gcloud compute tpus tpu-vm ssh my-slice --zone us-west4-a --worker all --command \
#     "git clone YOUR_COPY vit_flax && cd vit_flax && python3.11 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"
# The workdir has to be on a file system that all hosts see (Filestore or another NFS; a mounted bucket has no locks).
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "usage: TPU=NAME ZONE=ZONE $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 1
fi
config=$1 workdir=$2
shift 2
quoted=$(printf ' %q' --config "$config" --workdir "$workdir" --coordinator auto "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all \
  --command "cd vit_flax && .venv/bin/python -m vit_flax.main$quoted"
