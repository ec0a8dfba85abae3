"""LayerNorm ops with their checks and gradients. See `reference.py` for the formulas, in plain torch.

    y = layer_norm(x, weight, bias, 1e-5)
    y, x = layer_norm_residual(x, weight, bias, 1e-5)
    y, residual = add_layer_norm(x, x_bias, residual, weight, bias, 1e-5, 0.1, key, first_slot)
    residual = bias_dropout_add(x, x_bias, residual, 0.1, key, first_slot)

A pre-norm layer needs the sum twice: normalised, and as the next residual; `add_layer_norm` makes both in one
pass over memory. Where the sum is there already, `layer_norm_residual` hands it on: so its two gradients meet
in the norm's backward, and need no pass to be added. Kept for the backward: the sum, which the next layer
holds anyway, and mean and rstd of each row; `bias_dropout_add` keeps nothing. Masks are drawn again from the
key. All run under torch.compile: the launches are operators of torch (`opaque.py`), the rest it traces.

Shapes: T slots (any leading dimensions), F features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import require, require_kernel_device, require_kernel_dtype
from ..opaque import opaque

MAX_FEATURES = 16384
"""The forward keeps a row in the registers of one program."""


def layer_norm(x_TF: Tensor, weight_F: Tensor, bias_F: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias.

    Args:
        x_TF: [..., features], contiguous; bf16, fp16 or fp32. Statistics are fp32.
        weight_F, bias_F: [features] in the type of x.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    return layer_norm_residual(x_TF, weight_F, bias_F, eps)[0]


def layer_norm_residual(x_TF: Tensor, weight_F: Tensor, bias_F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`layer_norm` of x, x itself for the residual path). Arguments and errors as there."""
    _check("layer_norm", x_TF, {}, {"weight": weight_F, "bias": bias_F})
    return _AddLayerNorm.apply(x_TF, None, None, weight_F, bias_F, eps, 0.0, None, 0)


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
    # A launch that adds nothing makes no new residual to return.
    if x_bias_F is None and residual_TF is None and dropout_probability == 0.0:
        return x_TF
    _, new_residual_TF = _AddLayerNorm.apply(
        x_TF, x_bias_F, residual_TF, None, None, 0.0, dropout_probability, dropout_key, first_slot
    )
    return new_residual_TF


def _check(op: str, x_TF: Tensor, matrices: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    require_kernel_dtype(op, x_TF)
    features = x_TF.shape[-1]
    if not 1 <= features <= MAX_FEATURES:
        raise ValueError(f"{op}: got {features} features; allowed: 1 to {MAX_FEATURES}. Use {op}_reference")
    for name, matrix in ({"x": x_TF} | matrices).items():
        require(op, name, matrix, tuple(x_TF.shape), x_TF.dtype, x_TF.device)
    for name, vector in vectors.items():
        require(op, name, vector, (features,), x_TF.dtype, x_TF.device)


def _check_dropout(op: str, probability: float, key: Tensor | None, device: torch.device) -> None:
    if not 0.0 <= probability < 1.0:
        raise ValueError(
            f"{op}: dropout_probability is {probability}; allowed: 0 or more, below 1; leave it out for 0"
        )
    # Where nothing is dropped a key is ignored, so a model may pass one all the time.
    if probability > 0.0:
        if key is None:
            raise ValueError(
                f"{op}: dropout_probability is {probability} without a dropout_key; allowed: an int64 tensor "
                "of no dimensions; make one with philox.key_tensor"
            )
        require(op, "dropout_key", key, (), torch.int64, device)


def _layer_norm_forward(
    x_TF: Tensor, x_bias_F: Tensor | None, residual_TF: Tensor | None, weight_F: Tensor | None,
    bias_F: Tensor | None, eps: float, probability: float, key: Tensor | None, first_slot: int,
) -> list[Tensor]:  # fmt: skip
    """The new residual if anything is added, then y, mean and rstd if normed."""
    # Asked here, not where the op is called: torch.compile cannot look into Triton.
    require_kernel_device("layer_norm", x_TF)
    from .forward import Dropout, forward_tile, run_forward

    results = run_forward(
        x_TF,
        x_bias_F,
        residual_TF,
        (weight_F, bias_F, eps) if weight_F is not None and bias_F is not None else None,
        Dropout(probability, key, first_slot) if key is not None else None,
        forward_tile(x_TF.shape[-1]),
    )
    # A list, since a schema of torch knows no result that may be absent.
    return [tensor for tensor in results if tensor is not None]


def _fake_forward(
    x_TF: Tensor, x_bias_F: Tensor | None, residual_TF: Tensor | None, weight_F: Tensor | None,
    bias_F: Tensor | None, eps: float, probability: float, key: Tensor | None, first_slot: int,
) -> list[Tensor]:  # fmt: skip
    adds = x_bias_F is not None or residual_TF is not None or key is not None
    results = [torch.empty_like(x_TF)] if adds else []
    if weight_F is not None:
        statistic = x_TF.new_empty(x_TF.numel() // x_TF.shape[-1], dtype=torch.float32)
        results += [torch.empty_like(x_TF), statistic, torch.empty_like(statistic)]
    return results


def _layer_norm_backward(
    d_y_TF: Tensor | None, d_new_residual_TF: Tensor | None, normed_TF: Tensor | None, mean_T: Tensor | None,
    rstd_T: Tensor | None, weight_F: Tensor | None, has_bias: bool, probability: float, key: Tensor | None,
    first_slot: int,
) -> list[Tensor]:  # fmt: skip
    """The gradient of the sum if normed, that of x if dropped, column sums if any."""
    from .backward import backward_tile, run_backward
    from .forward import Dropout

    like_TF = d_y_TF if d_y_TF is not None else d_new_residual_TF
    assert like_TF is not None, "neither y nor new_residual has a gradient"
    is_normed = normed_TF is not None and mean_T is not None and rstd_T is not None and weight_F is not None
    d_sum_TF, d_x_TF, sums_KF = run_backward(
        d_y_TF,
        d_new_residual_TF,
        (normed_TF, mean_T, rstd_T, weight_F) if is_normed else None,  # type: ignore[arg-type]
        has_bias,
        Dropout(probability, key, first_slot) if key is not None else None,
        backward_tile(like_TF.shape[-1], like_TF.element_size()),
    )
    # What is only passed on is not returned: an operator's results are memory of their own.
    results = [d_sum_TF if is_normed else None, d_x_TF if key is not None else None, sums_KF]
    return [tensor for tensor in results if tensor is not None]


def _fake_backward(
    d_y_TF: Tensor | None, d_new_residual_TF: Tensor | None, normed_TF: Tensor | None, mean_T: Tensor | None,
    rstd_T: Tensor | None, weight_F: Tensor | None, has_bias: bool, probability: float, key: Tensor | None,
    first_slot: int,
) -> list[Tensor]:  # fmt: skip
    like_TF = d_y_TF if d_y_TF is not None else d_new_residual_TF
    assert like_TF is not None, "neither y nor new_residual has a gradient"
    # As in `_layer_norm_backward`: what is only passed on does not count.
    num_matrices = (normed_TF is not None) + (key is not None)
    num_sums = (2 if normed_TF is not None else 0) + has_bias
    matrices = [torch.empty_like(like_TF) for _ in range(num_matrices)]
    return matrices + ([like_TF.new_empty(num_sums, like_TF.shape[-1])] if num_sums else [])


_forward = opaque(_layer_norm_forward, _fake_forward)
_backward = opaque(_layer_norm_backward, _fake_backward)


def _without_gaps(gradient_TF: Tensor | None) -> Tensor | None:
    """Contiguous, as the kernel reads: the gradient of a sum, for one, arrives as an expanded scalar."""
    return None if gradient_TF is None else gradient_TF.contiguous()


class _AddLayerNorm(torch.autograd.Function):
    """All four ops: what is None is absent."""

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
        # A result that nobody used has None for a gradient, not zeros that the kernel would read.
        ctx.set_materialize_grads(False)
        # A mask of nothing dropped is not drawn.
        key = key if probability > 0.0 else None
        adds = x_bias_F is not None or residual_TF is not None or key is not None
        results = _forward(x_TF, x_bias_F, residual_TF, weight_F, bias_F, eps, probability, key, first_slot)
        # x itself where nothing is added: torch makes an alias of it.
        new_residual_TF = results[0] if adds else x_TF
        y_TF = None
        if weight_F is not None:
            y_TF, mean_T, rstd_T = results[-3:]
            # The rounded sum, which the next layer keeps alive anyway: not x and residual.
            ctx.save_for_backward(key, results[0] if adds else x_TF, mean_T, rstd_T, weight_F)
        else:
            ctx.save_for_backward(key)
        ctx.probability, ctx.first_slot, ctx.has_bias = probability, first_slot, x_bias_F is not None
        return y_TF, new_residual_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_new_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments; the dropout mask is drawn again from its key."""
        if d_y is None and d_new_residual is None:
            # What came after had no gradient for either.
            return (None,) * 9
        key, *normed = ctx.saved_tensors
        d_y_TF, d_new_residual_TF = _without_gaps(d_y), _without_gaps(d_new_residual)
        if d_y_TF is None:
            # Nobody used the norm, or there is none.
            normed = []
        has_bias = ctx.has_bias
        results = _backward(
            d_y_TF, d_new_residual_TF, *(normed or [None] * 4), has_bias, ctx.probability, key, ctx.first_slot
        )
        # Gradients that are the same are one tensor, not two views of it: a tensor that nobody else refers to
        # becomes the .grad of a leaf as it is, and two leaves would share its memory.
        d_sum = results[0] if normed else d_new_residual_TF
        d_x = results[1 if normed else 0] if key is not None else d_sum
        sums = list(results[-1]) if normed or has_bias else []
        return (
            d_x,
            sums[-1] if has_bias else None,
            d_sum if ctx.needs_input_grad[2] else None,
            *(sums[:2] if normed else (None, None)),
            *(None,) * 4,
        )
