"""The operations of `kernels/` that OPT is made of, by Triton or by their plain references.

What enters: `model.kernel_backend`, and `model.attention_backend` where attention is to come from elsewhere.
What leaves: an `Ops`, seven functions of one signature each whichever backend stands behind them, so that the
model has one path. The choice is explicit and nothing falls back: `triton` without a GPU is an error, and so
is `flash` without flash-attn.

    ops = choose_ops("triton", "flash", device)
    out_TND = ops.document_attention(qkv_TN3D, bounds, softmax_scale, dropout_probability, dropout_key,
                                     first_head)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_iml.kernels.bias_relu import relu_gradient, relu_gradient_reference
from megatron_iml.kernels.document_attention import (
    document_attention,
    document_attention_reference,
    flash_attention,
    load_varlen,
)
from megatron_iml.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    bias_dropout_add,
    bias_dropout_add_reference,
    layer_norm,
    layer_norm_reference,
    layer_norm_residual,
    layer_norm_residual_reference,
)
from megatron_iml.kernels.target_loss import target_loss, target_loss_reference


@dataclass(frozen=True)
class Ops:
    """What the functions do and take: the docstrings in `kernels/<op>/op.py`."""

    document_attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    layer_norm_residual: Callable[..., tuple[Tensor, Tensor]]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    bias_dropout_add: Callable[..., Tensor]
    relu_gradient: Callable[..., Tensor]
    target_loss: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Ops(
    document_attention=document_attention_reference,
    layer_norm=layer_norm_reference,
    layer_norm_residual=layer_norm_residual_reference,
    add_layer_norm=add_layer_norm_reference,
    bias_dropout_add=bias_dropout_add_reference,
    relu_gradient=relu_gradient_reference,
    target_loss=target_loss_reference,
)
TRITON = Ops(
    document_attention=document_attention,
    layer_norm=layer_norm,
    layer_norm_residual=layer_norm_residual,
    add_layer_norm=add_layer_norm,
    bias_dropout_add=bias_dropout_add,
    relu_gradient=relu_gradient,
    target_loss=target_loss,
)


SHAPES = Ops(
    document_attention=lambda qkv_TN3D, bounds, **unused: qkv_TN3D[:, :, 0],
    layer_norm=lambda hidden_T1F, weight_F, bias_F, eps: hidden_T1F,
    layer_norm_residual=lambda hidden_T1F, weight_F, bias_F, eps: (hidden_T1F, hidden_T1F),
    add_layer_norm=lambda update_T1F, bias_F, residual_T1F, *unused: (update_T1F, residual_T1F),
    bias_dropout_add=lambda update_T1F, bias_F, residual_T1F, *unused: update_T1F,
    relu_gradient=lambda hidden_T1F, bias_F: hidden_T1F,
    target_loss=lambda hidden_TF, weight_VF, rows_M, ids_M, **unused: (
        hidden_TF.sum(dtype=torch.float32),
        torch.empty(rows_M.shape, dtype=torch.float32, device=rows_M.device),
    ),
)
"""Right shapes and no arithmetic: for tensors that have no values (`training/dry_run.py`)."""


def choose_ops(kernels: str, attention: str | None, device: torch.device) -> Ops:
    """The operations of the backends; on meta tensors only their shapes.

    Args:
        kernels, attention: `model.kernel_backend` and `model.attention_backend`.

    Raises:
        ValueError: if a backend cannot run on the device, or is not installed.
    """
    # meta stands for the GPUs of a dry run, which refuse nothing.
    for key, backend in (("kernel_backend", kernels), ("attention_backend", attention)):
        if backend in ("triton", "flash") and device.type == "cpu":
            raise ValueError(
                f"model.{key}: got {backend} on {device.type}; allowed there: reference; set "
                f"model.{key}=reference, or run on a GPU"
            )
    if device.type == "meta":
        return SHAPES
    # Tables, not defaults: other names have been refused by the config.
    ops = {"reference": REFERENCE, "triton": TRITON}[kernels]
    if attention is None:
        return ops
    if attention == "flash":
        return replace(ops, document_attention=flash_attention(load_varlen()))
    theirs = {"reference": document_attention_reference, "triton": document_attention}[attention]
    return replace(ops, document_attention=theirs)


def offer_weight_gradient() -> None:
    """Give megatron-core's linears a weight gradient that adds to its fp32 buffer inside the GEMM.

    They look for Apex's extension of this name; without it every gradient is first written in low precision
    and then added. Ours is one call into cuBLAS (`kernels/weight_gradient.py`) and needs no extension.
    """
    from megatron.core.tensor_parallel import layers

    # Apex, where it is installed, stays: its extension does the same.
    if not layers._grad_accum_fusion_available:
        vars(layers)["fused_weight_gradient_mlp_cuda"] = _WeightGradient
        vars(layers)["_grad_accum_fusion_available"] = True


class _WeightGradient:
    """Stands where megatron-core imports Apex's module of functions."""

    # Without the module's other function, for buffers in low precision: `wrap_model` makes fp32 ones only.

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TF: Tensor, grad_output_TO: Tensor, main_grad_OF: Any) -> None:
        """main_grad += grad_output^T @ input."""
        # megatron-core has joined the first two axes; T is the whole row, under sequence parallelism too.
        from megatron_iml.kernels.weight_gradient import accumulate_weight_gradient

        accumulate_weight_gradient(main_grad_OF, grad_output_TO, input_TF)
