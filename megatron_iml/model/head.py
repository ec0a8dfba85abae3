"""The LM head on target rows: hidden states enter, the losses of the row's targets leave.

Labels are pairs (target_rows, target_ids), so the head computes nothing for the other rows: with 8.6 %
targets that is a twelfth of the work. The tied weight is cut along the vocabulary; two small reductions over
the tensor-parallel group join the shards' softmax.

    losses = head(ops, hidden_T1F, weight_VF, batch)          # head: TargetHead, the model's output_layer
    losses.total.backward()

Shapes: T slots (T / tensor size under sequence parallelism), M targets, F features, V vocabulary rows here.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .ops import Ops
from .row import MicroBatch


class TargetLosses(NamedTuple):
    """What the last stage leaves of a row."""

    total: Tensor
    """fp32 scalar with a gradient: the sum of the losses."""
    losses_M: Tensor
    """fp32 [M], detached: each target's negative log-likelihood."""


class TargetHead(ColumnParallelLinear):
    """megatron-core's vocabulary-parallel weight, used on target rows only.

    Its own forward would gather the whole row again and make logits of all of it. It is called as a module
    all the same: overlapped parameter gathers wait for a weight when its module is called.
    """

    def forward(self, ops: Ops, hidden_T1F: Tensor, weight_VF: Tensor, batch: MicroBatch) -> TargetLosses:
        """Losses of the batch's targets; `weight_VF` is this module's weight or the embedding's."""
        return target_losses(ops, self.config, self.tp_group, hidden_T1F, weight_VF, batch)


def target_losses(
    ops: Ops,
    config: TransformerConfig,
    tp_group: Any,
    hidden_T1F: Tensor,
    weight_VF: Tensor,
    batch: MicroBatch,
) -> TargetLosses:
    """Losses of the batch's (target_rows, target_ids) under the tied head."""
    assert batch.target_rows_M is not None and batch.target_ids_M is not None, "the last stage got no targets"
    # Each vocabulary shard gives a part of the gradient of hidden: the backward of either region adds the
    # parts.
    if config.sequence_parallel:
        hidden_T1F = gather_from_sequence_parallel_region(
            hidden_T1F, tensor_parallel_output_grad=True, group=tp_group
        )
    else:
        hidden_T1F = copy_to_tensor_model_parallel_region(hidden_T1F, group=tp_group)
    total, losses_M = ops.target_loss(
        # [T, F], all slots of the row under sequence parallelism too; no copy, the axis has one entry.
        hidden_T1F[:, 0],
        weight_VF,
        batch.target_rows_M,
        batch.target_ids_M,
        # Shards are equal: the config asks for a vocabulary that the tensor size divides.
        vocab_start=tp_group.rank() * weight_VF.shape[0],
        # One rank needs no reduction, and NCCL would launch one all the same.
        group_max=None if tp_group.size() == 1 else lambda x: dist.all_reduce(x, dist.ReduceOp.MAX, tp_group),
        group_sum=None if tp_group.size() == 1 else lambda x: dist.all_reduce(x, group=tp_group),
        loss_scale=_loss_scale(config, hidden_T1F.device),
        weight_grad_VF=_weight_gradient_buffer(config, weight_VF),
    )
    return TargetLosses(total, losses_M)


def _loss_scale(config: TransformerConfig, device: torch.device) -> Tensor | None:
    """The factor that the pipeline schedule multiplies the loss by before its backward: fp16's loss scale."""
    if config.grad_scale_func is None:
        return None
    return config.grad_scale_func(torch.ones((), device=device))


def _weight_gradient_buffer(config: TransformerConfig, weight_VF: Tensor) -> Tensor | None:
    """The fp32 buffer that the head's gradient is added to inside its GEMM; None leaves it to autograd.

    A pipeline's last stage holds a copy of the tied weight that nothing else uses: overlapped reduction
    learns only from autograd that its gradient is there.
    """
    if not config.gradient_accumulation_fusion or not torch.is_grad_enabled():
        return None
    return None if config.pipeline_model_parallel_size > 1 else vars(weight_VF)["main_grad"]
