#!/usr/bin/env bash
# The report's run of one size on one machine: runs/one_machine.sh 7b
#
#   RANKS   processes, one for each device (default: 8)
#
# 8 devices of 80 GB have room for 0.5b, 1.5b and 7b.
set -euo pipefail

start() {
  torchrun --standalone --nproc-per-node "${RANKS:-8}" -m qwen2.cli train "$@"
}

mesh_of() { :; } # nothing said: all ranks share all weights

# shellcheck source=report.sh
. "$(dirname "$0")/report.sh"
