"""bias_relu with its checks and gradients. See `reference.py` for plain torch. T slots, F features.

hidden = bias_relu(projected, bias)     # the backward keeps `hidden`, which the next projection keeps too
hidden = relu_gradient(hidden, bias)    # only that backward: a GEMM added the bias and took the ReLU
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import require, require_kernel_device, require_kernel_dtype
from ..opaque import opaque


def bias_relu(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """relu(x + bias), added in fp32 and rounded once.

    Args:
        x_TF: [..., features], contiguous; bf16, fp16 or fp32.
        bias_F: [features] in the same type.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    _check("bias_relu", "x", x_TF, bias_F)
    return _BiasReLU.apply(x_TF, bias_F)


def relu_gradient(y_TF: Tensor, bias_F: Tensor) -> Tensor:
    """`y` as it is, y = relu(x + bias), with the backward of that for x and bias; whoever made y has none.

    Args:
        y_TF: [..., features], contiguous; bf16, fp16 or fp32. The gradient that goes back is that of x.
        bias_F: [features] in the same type; only its gradient is of interest.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    _check("relu_gradient", "y", y_TF, bias_F)
    return _ReLUGradient.apply(y_TF, bias_F)


def _check(op: str, name: str, matrix_TF: Tensor, bias_F: Tensor) -> None:
    require_kernel_dtype(op, matrix_TF)
    require(op, name, matrix_TF, tuple(matrix_TF.shape), matrix_TF.dtype, matrix_TF.device)
    require(op, "bias", bias_F, (matrix_TF.shape[-1],), matrix_TF.dtype, matrix_TF.device)


def _bias_relu_forward(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    # Asked here, not where the op is called: torch.compile cannot look into Triton.
    require_kernel_device("bias_relu", x_TF)
    from .kernel import run_forward

    return run_forward(x_TF, bias_F)


def _bias_relu_backward(d_y_TF: Tensor, y_TF: Tensor) -> tuple[Tensor, Tensor]:
    require_kernel_device("bias_relu", y_TF)
    from .kernel import run_backward

    return run_backward(d_y_TF, y_TF)


_forward = opaque(_bias_relu_forward, lambda x_TF, bias_F: torch.empty_like(x_TF))
_backward = opaque(
    _bias_relu_backward, lambda d_y_TF, y_TF: (torch.empty_like(y_TF), y_TF.new_empty(y_TF.shape[1]))
)


class _BiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, bias_F: Tensor) -> Tensor:
        """The output is all that the backward needs."""
        y_TF = _forward(x_TF.view(-1, x_TF.shape[-1]), bias_F).view(x_TF.shape)
        ctx.save_for_backward(y_TF)
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TF: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the bias, from the output alone: it is above 0 where the input was."""
        return _gradients(ctx, d_y_TF)


class _ReLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TF: Tensor, bias_F: Tensor) -> Tensor:
        """Nothing is computed or copied."""
        ctx.save_for_backward(y_TF)
        return y_TF.view_as(y_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TF: Tensor) -> tuple[Tensor, Tensor]:
        """As of `bias_relu`."""
        return _gradients(ctx, d_y_TF)


def _gradients(ctx: Any, d_y_TF: Tensor) -> tuple[Tensor, Tensor]:
    (y_TF,) = ctx.saved_tensors
    features = y_TF.shape[-1]
    # The gradient of a sum, for one, arrives as an expanded scalar.
    d_x_TF, d_bias_F = _backward(d_y_TF.contiguous().view(-1, features), y_TF.view(-1, features))
    return d_x_TF.view(y_TF.shape), d_bias_F
