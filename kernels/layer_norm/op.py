"""LayerNorm ops with their checks and gradients. See `reference.py` for the formulas, in plain torch.

    y = layer_norm(x, weight, bias, 1e-5)
    y, residual = add_layer_norm(x, x_bias, residual, weight, bias, 1e-5, 0.1, key, first_slot)
    residual = bias_dropout_add(x, x_bias, residual, 0.1, key, first_slot)

A pre-norm layer needs the sum twice: normalised, and as the next residual; `add_layer_norm` makes both in one
pass over memory. Kept for the backward: the sum, which the next layer holds anyway, and mean and rstd of each
row; `bias_dropout_add` keeps nothing. Masks are drawn again from the key.

Shapes: T slots (any leading dimensions), F features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import require, require_kernel_device

MAX_FEATURES = 16384
"""A row has to fit the registers of one program."""


def layer_norm(x_TF: Tensor, weight_F: Tensor, bias_F: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias.

    Args:
        x_TF: [..., features], contiguous; bf16, fp16 or fp32. Statistics are fp32.
        weight_F, bias_F: [features] in the type of x.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    _check("layer_norm", x_TF, {}, {"weight": weight_F, "bias": bias_F})
    y_TF, _ = _AddLayerNorm.apply(x_TF, None, None, weight_F, bias_F, eps, 0.0, None, 0)
    return y_TF


def add_layer_norm(
    x_TF: Tensor,
    x_bias_F: Tensor,
    residual_TF: Tensor,
    weight_F: Tensor,
    bias_F: Tensor,
    eps: float,
    dropout_probability: float = 0.0,
    dropout_key: Tensor | None = None,
    first_slot: int = 0,
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(x + x_bias), and its LayerNorm.

    Args:
        x_TF, residual_TF: [..., features], contiguous; bf16, fp16 or fp32. x_bias_F, weight_F, bias_F:
            [features]. All of one type.
        dropout_probability: share of elements dropped, in [0, 1).
        dropout_key: int64 scalar tensor on the device (`philox.key_tensor`); needed only when
            something is dropped.
        first_slot: global index in the plan row of the first slot here.

    Returns:
        (y, new_residual), both in the shape and type of x.

    Raises:
        ValueError: shapes, types or devices that do not go together, a probability outside [0, 1), no key.
    """
    vectors = {"x_bias": x_bias_F, "weight": weight_F, "bias": bias_F}
    _check("add_layer_norm", x_TF, {"residual": residual_TF}, vectors)
    _check_dropout("add_layer_norm", dropout_probability, dropout_key, x_TF.device)
    return _AddLayerNorm.apply(
        x_TF, x_bias_F, residual_TF, weight_F, bias_F, eps, dropout_probability, dropout_key, first_slot
    )


def bias_dropout_add(
    x_TF: Tensor,
    x_bias_F: Tensor | None,
    residual_TF: Tensor | None,
    dropout_probability: float = 0.0,
    dropout_key: Tensor | None = None,
    first_slot: int = 0,
) -> Tensor:
    """residual + dropout(x + x_bias). None adds nothing: without both it is dropout, as after the embedding.

    Arguments and errors as in `add_layer_norm`.
    """
    matrices = {} if residual_TF is None else {"residual": residual_TF}
    _check("bias_dropout_add", x_TF, matrices, {} if x_bias_F is None else {"x_bias": x_bias_F})
    _check_dropout("bias_dropout_add", dropout_probability, dropout_key, x_TF.device)
    if x_bias_F is None and residual_TF is None and dropout_probability == 0.0:
        return x_TF
    _, new_residual_TF = _AddLayerNorm.apply(
        x_TF, x_bias_F, residual_TF, None, None, 0.0, dropout_probability, dropout_key, first_slot
    )
    return new_residual_TF


def _check(op: str, x_TF: Tensor, matrices: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    require_kernel_device(op, x_TF)
    features = x_TF.shape[-1]
    if not 1 <= features <= MAX_FEATURES:
        raise ValueError(f"{op}: got {features} features; allowed: 1 to {MAX_FEATURES}. Use {op}_reference")
    for name, matrix in ({"x": x_TF} | matrices).items():
        require(op, name, matrix, tuple(x_TF.shape), x_TF.dtype, x_TF.device)
    for name, vector in vectors.items():
        require(op, name, vector, (features,), x_TF.dtype, x_TF.device)


def _check_dropout(op: str, probability: float, key: Tensor | None, device: torch.device) -> None:
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"{op}: dropout_probability is {probability}; allowed: 0 or more, below 1")
    if probability > 0.0:
        if key is None:
            raise ValueError(
                f"{op}: dropout_probability is {probability} without a dropout_key; pass a tensor"
            )
        require(op, "dropout_key", key, (), torch.int64, device)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """[rows, features] without gaps: the gradient of a sum, for one, arrives as an expanded scalar."""
    return None if tensor is None else tensor.contiguous().view(-1, tensor.shape[-1])


class _AddLayerNorm(torch.autograd.Function):
    """All three ops: what is None is absent."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TF: Tensor,
        x_bias_F: Tensor | None,
        residual_TF: Tensor | None,
        weight_F: Tensor | None,
        bias_F: Tensor | None,
        eps: float,
        probability: float,
        key: Tensor | None,
        first_slot: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(the norm, the new residual); keeps the normed input and its statistics, never a dropout mask."""
        from .forward import Dropout, forward_tile, run_forward

        features = x_TF.shape[-1]
        rows_TF = x_TF.view(-1, features)
        dropout = Dropout(probability, key, first_slot) if key is not None and probability > 0.0 else None
        new_residual_TF, y_TF, mean_T, rstd_T = run_forward(
            rows_TF,
            x_bias_F,
            _rows(residual_TF),
            (weight_F, bias_F, eps) if weight_F is not None and bias_F is not None else None,
            dropout,
            forward_tile(features),
        )
        if y_TF is not None:
            normed_TF = new_residual_TF if new_residual_TF is not None else rows_TF
            ctx.save_for_backward(key, normed_TF, mean_T, rstd_T, weight_F)
        else:
            ctx.save_for_backward(key)
        ctx.dropout_numbers = (probability, first_slot) if dropout is not None else None
        ctx.has_bias = x_bias_F is not None
        return (
            y_TF.view(x_TF.shape) if y_TF is not None else None,
            new_residual_TF.view(x_TF.shape) if new_residual_TF is not None else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_new_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments; the dropout mask is drawn again from its key."""
        from .backward import backward_tile, run_backward
        from .forward import Dropout

        key, *normed = ctx.saved_tensors
        like = d_y if d_y is not None else d_new_residual
        assert like is not None, "autograd gives an output that is not used a gradient of zeros"
        dropout = None
        if ctx.dropout_numbers is not None:
            probability, first_slot = ctx.dropout_numbers
            dropout = Dropout(probability, key, first_slot)
        d_residual_TF, d_x_TF, sums = run_backward(
            _rows(d_y),
            _rows(d_new_residual),
            tuple(normed) if normed else None,
            ctx.has_bias,
            dropout,
            backward_tile(like.shape[-1], like.element_size()),
        )
        d_weight_F, d_bias_F = sums[:2] if normed else (None, None)
        return (
            d_x_TF.view(like.shape),
            sums[-1] if ctx.has_bias else None,
            d_residual_TF.view(like.shape) if ctx.needs_input_grad[2] else None,
            d_weight_F,
            d_bias_F,
            *(None,) * 4,
        )
