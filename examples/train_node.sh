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
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node gpu \
    -m megatron_iml.train --config "$config" "$@"
