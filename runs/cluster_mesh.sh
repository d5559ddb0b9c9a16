# The meshes of cluster.sh and slurm.sbatch, for NODES hosts of 8 devices of 80 GB: what talks most
# stays within a host. 57b-a14b and 72b need 4 hosts. More than 16 would have more ranks than the
# long-context stage has rows in a step: then give it mesh.cp, which qwen2 plan chooses.
# shellcheck shell=bash

mesh_of() {
  case $1 in
    57b-a14b) echo "mesh.ep=8" ;;            # tokens travel to their experts within a host
    72b) echo "mesh.tp=8" ;;                 # matrices are divided within a host
    *) echo "mesh.dp_replicate=$NODES" ;;    # weights are gathered within a host
  esac
}
