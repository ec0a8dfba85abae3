#!/usr/bin/env bash
# Train on many nodes under SLURM, and go on by itself when the job's time is up.
#   sbatch --nodes=16 examples/train_slurm.sh examples/recipes/opt-175b.yaml
#
# Five minutes before the time limit every rank gets SIGUSR1, saves a checkpoint and leaves with status 75 ("try
# again"); the job then puts itself back into the queue and resumes there. A run that fails is not requeued.
#SBATCH --job-name=megatron-iml
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch [--nodes=n] $0 CONFIG.yaml [section.field=value ...]" >&2
    exit 2
fi
config=$1
shift
saved_and_left=75

: "${SLURM_JOB_NODELIST:?error: this is a job script: sbatch $0 CONFIG, or train_node.sh outside of SLURM}"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts[0]}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE="$SLURM_NTASKS"
# See train_node.sh.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# A mistake in the configuration is said here, once, before any task is started; it ends the job, unrequeued.
"${PYTHON:-python}" -m megatron_iml.train --config "$config" --explain --world-size "$SLURM_NTASKS" "$@" > /dev/null

# One task per GPU, without torch.distributed.run between: its agent kills workers 30 seconds after a signal, too
# early for a large checkpoint, and hides their exit status. The first rank to leave does not end the others; those
# still there five minutes later hang.
status=0
# shellcheck disable=SC2016  # expanded by each task, which knows its rank
srun --kill-on-bad-exit=0 --wait=300 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$@"' task \
    "${PYTHON:-python}" -m megatron_iml.train --config "$config" "$@" || status=$?

if ((status == saved_and_left)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
