"""The gradient's norm in a launch per few hundred tensors.

megatron-core takes it from TransformerEngine or Apex. Where neither is installed its own stand-in goes tensor
by tensor and reads one number per parameter back to the host, each a wait for the device: 292 of them in
OPT-1.3B.

    l2_norm(65536, flag, [[[3.0], [4.0]]], False) -> ([5.0], None)
"""

from typing import Any

import torch
from torch import Tensor


def offer_l2_norm() -> None:
    """Let megatron-core use the function below, unless it has found Apex's or TransformerEngine's."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        vars(clip_grads)["l2_norm_impl"] = l2_norm


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *unused: Any
) -> tuple[Tensor, None]:
    """L2 norm of all tensors together, fp32 [1], left on the device."""
    # Chunk size and overflow flag are Apex's business; megatron-core reduces the square over ranks itself.
    assert not per_tensor, "a norm per tensor is not asked for by any caller"
    return torch.nn.utils.get_total_norm(tensor_lists[0]).float().view(1), None
