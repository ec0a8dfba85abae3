"""relu(x + bias) in plain torch: the truth for the kernels. T slots, F features.

x [[1, -3]], bias [1, 1]  ->  [[2, 0]]
"""

from typing import Any

import torch
from torch import Tensor


def bias_relu_reference(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """relu(x + bias), added in fp32 (fp64 for fp64 input) and rounded once; see `op.bias_relu`."""
    precision = torch.promote_types(x_TF.dtype, torch.float32)
    return torch.relu(x_TF.to(precision) + bias_F.to(precision)).to(x_TF.dtype)


def relu_gradient_reference(y_TF: Tensor, bias_F: Tensor) -> Tensor:
    """`y` with the backward of y = relu(x + bias), sums in fp32 (fp64 for fp64); see `op.relu_gradient`."""
    return _ReLUGradient.apply(y_TF, bias_F)


class _ReLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TF: Tensor, bias_F: Tensor) -> Tensor:
        """y as it is."""
        ctx.save_for_backward(y_TF)
        return y_TF.view_as(y_TF)

    @staticmethod
    def backward(ctx: Any, d_y_TF: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and bias. NaN is not at or below 0, so it passes, as in torch."""
        (y_TF,) = ctx.saved_tensors
        # Not y > 0: that would stop a NaN.
        d_x_TF = d_y_TF.masked_fill(y_TF <= 0.0, 0.0)
        precision = torch.promote_types(y_TF.dtype, torch.float32)
        return d_x_TF, d_x_TF.flatten(0, -2).sum(0, dtype=precision).to(y_TF.dtype)
