#!/usr/bin/env bash
# Train on the GPUs of one node, all that are visible.
#   examples/train_node.sh examples/recipes/opt-6.7b.yaml training.output_directory=runs/first
set -euo pipefail

if (($# == 0)); then
    echo "usage: [CUDA_VISIBLE_DEVICES=0,1] $0 CONFIG.yaml [section.field=value ...]" >&2
    exit 2
fi
config=$1
shift

# One hardware queue keeps kernels in the order of their launch, which is how communication gets ahead of the
# matrix product that it overlaps.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# By torch and not nvidia-smi, which does not know CUDA_VISIBLE_DEVICES.
gpus=$("${PYTHON:-python}" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
    echo "error: GPUs: got none that torch sees; allowed: 1 or more; see nvidia-smi and CUDA_VISIBLE_DEVICES, or take train_cpu.sh" >&2
    exit 2
fi
# A mistake in the configuration is said here, once, before any process is started.
"${PYTHON:-python}" -m megatron_iml.train --config "$config" --explain --world-size "$gpus" "$@" > /dev/null
exec "${PYTHON:-python}" -m megatron_iml.launch --standalone --nproc-per-node "$gpus" \
    -m megatron_iml.train --config "$config" "$@"
