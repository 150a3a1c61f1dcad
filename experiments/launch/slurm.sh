#!/usr/bin/env bash
# Trains an experiment on several nodes of a SLURM cluster:
#
#   sbatch --nodes 2 experiments/launch/slurm.sh experiments/bm7_densenet.py --data.root FOLDER
#
# One process a GPU, which is how jax divides a node under srun. RUN_DIR (default runs/slurm-<job>) must be on a disk
# that all nodes see. Two minutes before its time is up the job is told by SIGTERM; all processes stop at the same
# step, the state is on disk, and the job is queued again to go on.
#SBATCH --job-name=bmjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${1:?expected an experiment: sbatch slurm.sh EXPERIMENT [--FIELD VALUE ...]}"
run_dir="${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}"

status=0
srun --kill-on-bad-exit=1 bmjax train "$@" --run_dir "$run_dir" --resume || status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
