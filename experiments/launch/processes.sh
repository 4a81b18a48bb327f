#!/usr/bin/env bash
# Several processes on this machine, joined over loopback: how a job of many hosts is tried out on one.
#
#   NUM=2 experiments/launch/processes.sh configs/digits.py runs/digits --config.mesh.fsdp=2
#
# The output of each process goes to WORKDIR.process_<i>.log; that of process 0 is shown, too.
set -uo pipefail
cd "$(dirname "$0")/../.."
if [ $# -lt 2 ]; then echo "usage: NUM=2 $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2; exit 1; fi
config=$1 workdir=$2 num=${NUM:-2} port=${PORT:-$((20000 + RANDOM % 20000))}
shift 2
pids=()
for i in $(seq 0 $((num - 1))); do
  log=$workdir.process_$i.log
  mkdir -p "$(dirname "$log")"
  command=("${PYTHON:-.venv/bin/python}" -m vit_flax.main --config "$config" --workdir "$workdir"
    --coordinator "127.0.0.1:$port" --num_processes "$num" --process_id "$i" "$@")
  if [ "$i" = 0 ]; then "${command[@]}" > >(tee "$log") 2>&1 & else "${command[@]}" >"$log" 2>&1 & fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
worst=0
for pid in "${pids[@]}"; do
  wait "$pid"
  code=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done  # a signal to this script ends `wait` early
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
