#!/usr/bin/env bash
# The report's run of one size on several machines with a common file system. On each of them:
#
#   NODES=4 NODE_RANK=0..3 HEAD=name-of-the-first:29500 runs/cluster.sh 7b
#
# A machine that fails ends its run; all ranks then start again from the newest checkpoint.
set -euo pipefail
: "${NODES:?how many machines}" "${NODE_RANK:?the number of this one, from 0}" "${HEAD:?host:port}"

start() {
  torchrun --nnodes "$NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$(basename "$1")" "${surviving[@]}" \
    -m qwen2.cli train "$@"
}

# shellcheck source=cluster_mesh.sh
. "$(dirname "$0")/cluster_mesh.sh"
# shellcheck source=report.sh
. "$(dirname "$0")/report.sh"
