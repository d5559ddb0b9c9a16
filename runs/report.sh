# The order of the report (sections 2.2.2 and 3) for one size. Sourced by one_machine.sh, cluster.sh
# and slurm.sbatch, which differ in two functions alone:
#
#   start RECIPE [key=value]...   qwen2 train on all ranks
#   mesh_of SIZE                  the overrides that say how the ranks share that size
#
# Text, tokenizer and shards are there: out/shards, out/held-out, out/tokenizer, as in the recipes.
# Given again, everything goes on where it stopped: finished stages are left as they are.
#
#   RECIPES   a folder of recipes instead of those that are shipped, such as RECIPES=mine/
#   UPCYCLE   more options of qwen2 upcycle
# shellcheck shell=bash
# shellcheck disable=SC2046,SC2086  # options are split at spaces on purpose

size=${1:?usage: $0 SIZE, one of 0.5b 1.5b 7b 72b 57b-a14b}
mixture=57b-a14b
upcycled=out/$mixture-upcycled

# The learning rate that ended pre-training, a tenth of its recipe's.
declare -A last_lr=([0.5b]=4.0e-5 [1.5b]=4.0e-5 [7b]=3.0e-5 [57b-a14b]=3.0e-5 [72b]=1.5e-5)
[[ -v last_lr[$size] ]] || { echo "$0: $size: choose one of ${!last_lr[*]}" >&2; exit 2; }

# Full recomputation is what fits everywhere; qwen2 plan knows what is faster on your devices.
train() { # RECIPE SIZE [key=value]...
  start "${RECIPES:-}$1.yaml" activation_checkpointing=full $(mesh_of "$2") "${@:3}"
}

pretrain() { train "$1" "$1"; } # 4,096 tokens
long_context() {                # 32,768
  train long_context "$1" "init=out/$1/model" "out=out/$1-long" "optimizer.lr=${last_lr[$1]}"
}

# On one host, while the others wait for the folder, which appears when it is complete.
upcycle() {
  if [[ -e $upcycled ]]; then return; fi
  if ((${NODE_RANK:-0} == 0)); then
    python -m qwen2.cli upcycle out/7b/model "$upcycled" ${UPCYCLE:-}
  else
    until [[ -e $upcycled ]]; do sleep 10; done
  fi
}

dense=$size
if [[ $size == "$mixture" ]]; then dense=7b; fi
pretrain "$dense"
long_context "$dense"
if [[ $size == "$mixture" ]]; then
  upcycle
  pretrain "$mixture"
  long_context "$mixture"
fi
