"""Gradient buffers and the distributed optimizer around a model.

    wrapped = wrap_model(chunks, config)              # megatron-core's DDP: contiguous fp32 gradient buffers
    optimizer = build_optimizer(wrapped, config)      # fp32 master weights and moments, sharded over data
    ranks

Two remedies for megatron-core 0.16.1 live here, both for checkpoints that reshard: our Adam (`adam.py`) takes
the place of torch's, and `PaddedBucketOptimizer` puts back the padding between gradient buckets that a save
leaves out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_iml.config import Config
from megatron_iml.model.opt import OPTModel
from megatron_iml.model.transformer_config import PRECISIONS

from .adam import Adam


class PaddedBucketOptimizer(DistributedOptimizer):
    """A distributed optimizer whose reshardable save survives padded gradient buckets.

    megatron-core packs the buckets' states without the padding between them, then cuts out each parameter at
    offsets that include it: with any padded bucket but the last, every later parameter is saved shifted,
    silently. Overlapped reduction, a tied embedding under a pipeline (a bucket of its own) and data-parallel
    sizes that are not powers of two all cause it.
    """

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        """megatron-core's gathered state, with every bucket at the offset its parameters are cut out at."""
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values():
                for key, packed in tensors.items():
                    # Beside the packed states lie plain numbers about the buffer.
                    if isinstance(packed, torch.Tensor) and packed.dim() == 1:
                        tensors[key] = _restore_padding(packed, buffer)
        return state


def _restore_padding(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = packed.new_zeros(buffer.numel)
    offset = 0
    for bucket in buffer.buckets:
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[
            offset : offset + bucket.numel_unpadded
        ]
        offset += bucket.numel_unpadded
    assert offset == packed.numel(), f"buckets hold {offset} elements, the gathered state {packed.numel()}"
    return padded


def wrap_model(chunks: Sequence[OPTModel], config: Config) -> list[DistributedDataParallel]:
    """Give each chunk its gradient buffers, summed over data ranks in fp32."""
    ddp_config = DistributedDataParallelConfig(
        # bf16 sums over hundreds of micro-batches lose what small gradients add.
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
    )
    # Weights are filled later, from the same source on every data rank: there is nothing to broadcast.
    return [
        # Interleaving already hides the reduction of later chunks behind the first one's compute.
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(wrapped: Sequence[DistributedDataParallel], config: Config) -> ChainedOptimizer:
    """Adam on fp32 master weights sharded over data ranks, with clipping and dynamic loss scaling for
    fp16."""
    optimizer_config, precision = config.optimizer, config.training.precision
    engine_config = EngineOptimizerConfig(
        optimizer="adam",
        lr=optimizer_config.learning_rate,
        min_lr=optimizer_config.min_learning_rate,
        weight_decay=optimizer_config.weight_decay,
        adam_beta1=optimizer_config.adam_beta1,
        adam_beta2=optimizer_config.adam_beta2,
        adam_eps=optimizer_config.adam_eps,
        clip_grad=optimizer_config.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=PRECISIONS[precision],
        initial_loss_scale=optimizer_config.initial_loss_scale,
        min_loss_scale=optimizer_config.min_loss_scale,
        loss_scale_window=optimizer_config.loss_scale_window,
        hysteresis=optimizer_config.loss_scale_hysteresis,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    chained = get_megatron_optimizer(
        engine_config, list(wrapped), use_gloo_process_groups=torch.distributed.get_backend() != "fake"
    )
    assert isinstance(chained, ChainedOptimizer), (
        f"megatron-core built a {type(chained).__name__}, not a chain"
    )
    betas = (optimizer_config.adam_beta1, optimizer_config.adam_beta2)
    for optimizer in chained.chained_optimizers:
        assert type(optimizer) is DistributedOptimizer, f"unexpected optimizer {type(optimizer).__name__}"
        optimizer.optimizer = Adam(optimizer.optimizer.param_groups, betas, optimizer_config.adam_eps)
        # megatron-core offers no way to name the class; state and attributes stay as built.
        optimizer.__class__ = PaddedBucketOptimizer
    connect_schedule(wrapped, chained, config)
    return chained


def connect_schedule(
    wrapped: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, config: Config
) -> None:
    """Tell megatron-core's pipeline schedules how to scale losses and reduce gradients."""
    engine_config = wrapped[0].config
    # 1 outside fp16; `model/head.py` asks it too, for gradients it makes in the forward.
    engine_config.grad_scale_func = optimizer.scale_loss
    engine_config.finalize_model_grads_func = finalize_model_grads
    # Gradients are reduced once a step, in the last micro-batch.
    engine_config.no_sync_func = (
        [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    )
    # Interleaved, the schedule itself knows when a chunk's last gradient is there.
    if config.parallel.overlap_grad_reduce and len(wrapped) > 1:
        engine_config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    if config.parallel.overlap_param_gather and len(wrapped) > 1:
        engine_config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
