#!/usr/bin/env bash
# Train on this machine's CPU: NUM_PROCESSES ranks (1 unless set) over gloo, one thread each.
#   NUM_PROCESSES=2 examples/train_cpu.sh train.yaml parallel.tensor_model_parallel_size=2
set -euo pipefail

if (($# == 0)); then
    echo "usage: NUM_PROCESSES=n $0 CONFIG.yaml [section.field=value ...]" >&2
    exit 2
fi
config=$1
shift

export CUDA_VISIBLE_DEVICES=""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# megatron-core imports the compiler for fusions that OPT does not have: a third of the start-up time.
export TORCH_COMPILE_DISABLE=1 TORCHDYNAMO_DISABLE=1
# A mistake in the configuration is said here, once, before any process is started.
"${PYTHON:-python}" -m megatron_iml.train --config "$config" --explain --world-size "${NUM_PROCESSES:-1}" "$@" > /dev/null
exec "${PYTHON:-python}" -m megatron_iml.launch --standalone --nproc-per-node "${NUM_PROCESSES:-1}" \
    -m megatron_iml.train --config "$config" "$@"
