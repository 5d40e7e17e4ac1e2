#!/bin/bash
# One recipe over the nodes of a Slurm job:
#
#   sbatch --nodes 4 recipes/launch/slurm.sh recipes/qwen2.5-7b.yaml
#
# `sgpo run` works on the first node and starts training steps on all of them (train.sh beside this file). What is up
# to date is skipped, so a job that ran out of time is continued by the same command, or by Slurm itself (--requeue):
# SIGTERM comes two minutes before the end, and the training saves a checkpoint. The working directory, run_dir and
# the Hugging Face cache (HF_HOME) must be on a file system that all nodes see.
#SBATCH --job-name=sgpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

export OMP_NUM_THREADS=8
exec sgpo run "${1:?usage: sbatch recipes/launch/slurm.sh RECIPE}"
