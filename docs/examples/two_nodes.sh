#!/usr/bin/env bash
# Two nodes of one process each, both on this machine, on CPUs. Two machines run the same command
# each, with its own --node-rank and the first one's address. Arguments are those of `fit`.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

node() {
  torchrun --nnodes 2 --node-rank "$1" --nproc-per-node 1 \
    --master-addr 127.0.0.1 --master-port "${MASTER_PORT:-29500}" \
    cli.py fit --trainer.num_nodes 2 --trainer.devices 1 \
    --trainer.strategy ddp --trainer.accelerator cpu "${@:2}"
}

node 1 "$@" &
second=$!
# A node that failed leaves the other waiting.
trap 'kill "$second" 2>/dev/null || true' EXIT
node 0 "$@"
wait "$second"
