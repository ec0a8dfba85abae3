"""LM head and cross entropy on target rows in plain torch: the truth for the kernels.

    logits = hidden[target_rows] @ weight^T
    loss[j] = log(sum over v of exp(logits[j, v])) - logits[j, target_ids[j]]

What enters: hidden states, this rank's rows of the vocabulary, pairs (row, id), and the reductions over the
vocabulary's ranks. What leaves: the sum of the losses, and each loss, detached. A row may occur more than
once (documents that share a prefix).

    hidden [[1, 0]], weight [[0, 0], [ln 3, 0]], rows [0, 0], ids [0, 1]  ->  losses [ln 4, ln 4 - ln 3]

Shapes: T slots, M targets, F features, V rows of the vocabulary here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], object]
"""Reduces a small fp32 tensor over the vocabulary's ranks, in place."""


def target_loss_reference(
    hidden_TF: Tensor,
    weight_VF: Tensor,
    target_rows_M: Tensor,
    target_ids_M: Tensor,
    *,
    vocab_start: int = 0,
    group_max: Reduce | None = None,
    group_sum: Reduce | None = None,
    loss_scale: Tensor | None = None,
    weight_grad_VF: Tensor | None = None,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `op.target_loss`. Here all logits exist at once and all gradients come in the backward, so
    `loss_scale` and `chunk` change nothing."""
    if weight_grad_VF is not None:
        # A leaf of its own: its hook fills the buffer, and the weight itself gets no gradient, as in `op`.
        weight_VF = weight_VF.detach().requires_grad_(weight_VF.requires_grad)
        if weight_VF.requires_grad:
            weight_VF.register_hook(lambda gradient_VF: _add(weight_grad_VF, gradient_VF))
    precision = torch.promote_types(hidden_TF.dtype, torch.float32)
    logits_MV = hidden_TF.index_select(0, target_rows_M).to(precision) @ weight_VF.to(precision).t()
    with torch.no_grad():
        # Only shifts the exponents: its gradient would cancel.
        maximum_M = logits_MV.amax(dim=1) if logits_MV.numel() else logits_MV.new_zeros(0)
        if group_max is not None:
            group_max(maximum_M)
        local_ids_M = target_ids_M - vocab_start
        # An id of another rank's rows reads row 0 here and is zeroed.
        is_here_M = (local_ids_M >= 0) & (local_ids_M < weight_VF.shape[0])
        local_ids_M = torch.where(is_here_M, local_ids_M, 0)
    at_target_M = torch.where(is_here_M, logits_MV.gather(1, local_ids_M[:, None]).squeeze(1), 0.0)
    with torch.no_grad():
        sum_and_target = torch.stack([torch.exp(logits_MV - maximum_M[:, None]).sum(dim=1), at_target_M])
        if group_sum is not None:
            group_sum(sum_and_target)
        log_normaliser_M = maximum_M + torch.log(sum_and_target[0])
        probabilities_MV = torch.exp(logits_MV - log_normaliser_M[:, None])
        losses_M = (log_normaliser_M - sum_and_target[1]).float()
    # Its gradient is probabilities - onehot; its value does not matter. A reduction has no gradient here.
    surrogate = (probabilities_MV * logits_MV).sum() - at_target_M.sum()
    return losses_M.sum() + (surrogate - surrogate.detach()).float(), losses_M


def _add(buffer: Tensor, gradient: Tensor) -> None:
    """Add in place and return nothing: what a hook returns would replace the gradient, in the buffer's
    type."""
    buffer.add_(gradient)
