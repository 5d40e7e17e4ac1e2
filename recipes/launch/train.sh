#!/bin/bash
# Starts a training step on all GPUs there are: `launch: bash recipes/launch/train.sh fsdp2` in a recipe.
# In a Slurm job with several nodes, on all of them; without a GPU, as one plain process.
#
#   train.sh CONFIG -m sgpo_cli STAGE ...      CONFIG is fsdp2, zero3 or ddp: a file beside this one
set -euo pipefail

config=$(cd "$(dirname "$0")" && pwd)/$1.yaml
shift
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)

if [ "$gpus" -eq 0 ]; then
  exec python "$@"
fi
if [ "${SLURM_NNODES:-1}" -eq 1 ]; then
  exec accelerate launch --config_file "$config" --num_processes "$gpus" "$@"
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export CONFIG=$config HEAD_NODE=$head GPUS=$gpus
# One launcher per node; a rank that is lost ends all of them.
# shellcheck disable=SC2016  # the variables are those of each node
exec srun --nodes "$SLURM_NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * GPUS))" --main_process_ip "$HEAD_NODE" \
    --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" "$@"' accelerate "$@"
