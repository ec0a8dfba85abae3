"""LayerNorm, and bias, dropout and residual addition before it, in plain torch: the truth for the kernels.

    new_residual = residual + dropout(x + x_bias)
    y = (new_residual - mean) / sqrt(variance + eps) * weight + bias        mean, variance over the features

Everything is computed in fp32 (fp64 for fp64 input) and rounded where the kernels round: new_residual once,
y once, and y from the rounded new_residual. T slots, F features; leading dimensions of x are flattened to T.

    x [[1, 3]], x_bias [1, 1], residual [[0, 0]]  ->  new_residual [[2, 4]], y [[-1, 1]]  (weight 1, bias 0)
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as torch_layer_norm

from ..philox import keep_mask


def layer_norm_reference(x_TF: Tensor, weight_F: Tensor, bias_F: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension; see `op.layer_norm`."""
    precision = torch.promote_types(x_TF.dtype, torch.float32)
    weight_F, bias_F = weight_F.to(precision), bias_F.to(precision)
    return torch_layer_norm(x_TF.to(precision), weight_F.shape, weight_F, bias_F, eps).to(x_TF.dtype)


def layer_norm_residual_reference(
    x_TF: Tensor, weight_F: Tensor, bias_F: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same and x itself; see `op.layer_norm_residual`."""
    return layer_norm_reference(x_TF, weight_F, bias_F, eps), x_TF


def bias_dropout_add_reference(
    x_TF: Tensor,
    x_bias_F: Tensor | None,
    residual_TF: Tensor | None,
    dropout_probability: float = 0.0,
    dropout_key: int | Tensor | None = None,
    first_slot: int = 0,
) -> Tensor:
    """residual + dropout(x + x_bias); see `op.bias_dropout_add`."""
    total_TF = x_TF.to(torch.promote_types(x_TF.dtype, torch.float32))
    if x_bias_F is not None:
        total_TF = total_TF + x_bias_F
    if dropout_probability > 0.0:
        assert dropout_key is not None, f"dropout {dropout_probability} without a key"
        keep_TF = _keep(x_TF, dropout_probability, dropout_key, first_slot)
        # Not a product with the mask: 0 * NaN is NaN, and the kernels drop a NaN with its element.
        total_TF = torch.where(keep_TF, total_TF / (1.0 - dropout_probability), 0.0)
    if residual_TF is not None:
        total_TF = residual_TF + total_TF
    return total_TF.to(x_TF.dtype)


def add_layer_norm_reference(
    x_TF: Tensor,
    x_bias_F: Tensor,
    residual_TF: Tensor,
    weight_F: Tensor,
    bias_F: Tensor,
    eps: float,
    dropout_probability: float = 0.0,
    dropout_key: int | Tensor | None = None,
    first_slot: int = 0,
) -> tuple[Tensor, Tensor]:
    """The two above, one after the other; see `op.add_layer_norm`."""
    new_residual_TF = bias_dropout_add_reference(
        x_TF, x_bias_F, residual_TF, dropout_probability, dropout_key, first_slot
    )
    return layer_norm_reference(new_residual_TF, weight_F, bias_F, eps), new_residual_TF


def _keep(x_TF: Tensor, probability: float, key: int | Tensor, first_slot: int) -> Tensor:
    """The mask in the shape of x."""
    features = x_TF.shape[-1]
    rows_T = torch.arange(x_TF.numel() // features, device=x_TF.device) + first_slot
    columns_F = torch.arange(features, device=x_TF.device)
    # A hidden state has no heads: one plane for all.
    plane = torch.zeros(1, dtype=torch.int64, device=x_TF.device)
    return keep_mask(key, probability, rows_T, columns_F, plane)[0].view(x_TF.shape)
