"""The gradient's norm and its clipping in a launch per few hundred tensors.

megatron-core takes both from TransformerEngine or Apex. Where neither is installed its own stand-ins go
tensor by tensor: the norm reads one number per parameter back to the host, each a wait for the device (292 of
them in OPT-1.3B), and clipping copies every gradient twice. Ours have the same signatures and use torch's
grouped kernels.

    l2_norm(65536, flag, [[[3.0], [4.0]]], False) -> ([5.0], None)
    scale(65536, flag, [gradients, gradients], 0.5)      gradients halved in place
"""

from typing import Any

import torch
from torch import Tensor


def offer_multi_tensor_kernels() -> None:
    """Let megatron-core clip with the functions below, unless it has found Apex's or TransformerEngine's."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        vars(clip_grads).update(l2_norm_impl=l2_norm, multi_tensor_scale_impl=scale)


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *unused: Any
) -> tuple[Tensor, None]:
    """L2 norm of all tensors together, fp32 [1], left on the device."""
    assert not per_tensor, "a norm per tensor is not asked for by any caller"
    return torch.nn.utils.get_total_norm(tensor_lists[0]).float().view(1), None


def scale(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Multiply the first list's tensors into the second's, which megatron-core calls with one list twice."""
    source, target = tensor_lists
    assert all(a is b for a, b in zip(source, target, strict=True)), "scaled into other tensors"
    torch._foreach_mul_(target, factor)
