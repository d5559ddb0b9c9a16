# What cluster.sh and slurm.sbatch share.
#
# A rank that dies ends its job, which starts again from the newest checkpoint: three times. SIGTERM
# and SIGUSR1 save one first, and may take ten minutes for it. Restarted ranks would find those
# before them in the store that torchrun shares with them (pytorch/pytorch#135712).
# shellcheck shell=bash
# shellcheck disable=SC2034  # used by those who source this
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
surviving=(
  --max-restarts 3
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  --shutdown-timeout 600
)

# The meshes, for NODES hosts of 8 devices of 80 GB: what talks most
# stays within a host. 57b-a14b and 72b need 4 hosts. More than 16 would have more ranks than the
# long-context stage has rows in a step: then give it mesh.cp, which qwen2 plan chooses.

mesh_of() {
  case $1 in
    57b-a14b) echo "mesh.ep=8" ;;            # tokens travel to their experts within a host
    72b) echo "mesh.tp=8" ;;                 # matrices are divided within a host
    *) echo "mesh.dp_replicate=$NODES" ;;    # weights are gathered within a host
  esac
}
