"""The forward kernel: bias, dropout, residual addition and LayerNorm of one row while it is in registers.

    x, residual  --read once-->  new_residual = residual + dropout(x + x_bias)  --written once
                                 mean, rstd of the rounded new_residual         --written, 8 bytes a row
                                 y = (new_residual - mean) * rstd * weight + bias  --written once

A program takes ROWS whole rows: the mean and the variance are taken in two passes over registers, so large
means cost no precision. What is absent (no bias, no residual, no dropout, no norm) is a None pointer, and its
code is not compiled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import keep_threshold
from ..philox_triton import keep_tile


@dataclass(frozen=True)
class Dropout:
    """One mask, and where in the plan row's slots the tensor begins."""

    probability: float
    key: Tensor
    """int64, 0-dim, on the device: a key that changes every row must not be a constant of the kernel."""
    first_slot: int

    @property
    def threshold(self) -> int:
        """Smallest Philox word that is kept."""
        return keep_threshold(self.probability)

    @property
    def scale(self) -> float:
        """Factor on what is kept."""
        return 1.0 / (1.0 - self.probability)


# Triton compiles anew for integers that are 1 or divide by 16: one kernel serves every slot and probability.
@triton.jit(do_not_specialize=["first_slot", "threshold"])
def _forward(
    x_ptr,  # [T, F]
    x_bias_ptr,  # [F] or None
    residual_ptr,  # [T, F] or None
    new_residual_ptr,  # [T, F], written, or None when nothing is added
    weight_ptr,  # [F], or None without the norm, like all that follow
    bias_ptr,  # [F]
    y_ptr,  # [T, F], written
    mean_ptr,  # fp32 [T], written
    rstd_ptr,  # fp32 [T], written
    key_ptr,  # int64 [], or None without dropout
    num_rows,  # T
    first_slot,  # of the plan row: masks count slots there, not in this tensor
    threshold,  # `Dropout.threshold`
    scale,  # 1 / (1 - p)
    eps,
    NUM_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = tl.arange(0, BLOCK)  # [BLOCK], the whole row: its statistics need no other program
    in_features = columns < NUM_FEATURES
    mask = (rows < num_rows)[:, None] & in_features[None, :]
    offsets = rows.to(tl.int64)[:, None] * NUM_FEATURES + columns[None, :]

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + columns, mask=in_features, other=0.0).to(tl.float32)[None, :]
    if key_ptr is not None:
        keep = keep_tile(tl.load(key_ptr), threshold, first_slot + rows, 0, 0, BLOCK)
        x = tl.where(keep, x * scale, 0.0)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if new_residual_ptr is not None:
        rounded = x.to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + offsets, rounded, mask=mask)
        # The backward reads the rounded sum: normalise just that.
        x = rounded.to(tl.float32)

    if weight_ptr is not None:
        # `/` and sqrt are approximations on a GPU; div_rn and sqrt_rn round as IEEE says.
        mean = tl.div_rn(tl.sum(x, axis=1), NUM_FEATURES * 1.0)  # [ROWS]
        # Zeroed beyond the row: each of those columns would add mean^2 to the variance.
        centred = tl.where(in_features[None, :], x - mean[:, None], 0.0)
        variance = tl.div_rn(tl.sum(centred * centred, axis=1), NUM_FEATURES * 1.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        weight = tl.load(weight_ptr + columns, mask=in_features, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, mask=in_features, other=0.0).to(tl.float32)
        y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        # fp32 also of a 16-bit row: the backward takes x - mean again, which a rounded mean would spoil.
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


def forward_tile(num_features: int) -> tuple[int, int]:
    """Rows per program and warps, measured on an H100."""
    block = triton.next_power_of_2(num_features)
    # 2,048 elements are one 16-byte load of bf16 for every thread of 8 warps.
    return max(1, 2048 // block), 8 if block <= 8192 else 16


def run_forward(
    x_TF: Tensor,
    x_bias_F: Tensor | None,
    residual_TF: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    dropout: Dropout | None,
    tile: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the forward.

    Args:
        x_TF, residual_TF: [..., features], contiguous.
        norm: weight, bias and eps.
        tile: rows per program and warps.

    Returns:
        new_residual (None when there is no bias, residual or dropout), y, mean and rstd (None without norm).
        The first two have the shape of x, and memory of their own: a pipeline frees what it has sent, which
        it cannot do to a view.
    """
    num_features = x_TF.shape[-1]
    num_rows = x_TF.numel() // num_features
    adds = x_bias_F is not None or residual_TF is not None or dropout is not None
    new_residual_TF = torch.empty_like(x_TF) if adds else None
    weight_F, bias_F, eps = norm if norm is not None else (None, None, 0.0)
    y_TF = mean_T = rstd_T = None
    if norm is not None:
        y_TF = torch.empty_like(x_TF)
        mean_T = torch.empty(num_rows, dtype=torch.float32, device=x_TF.device)
        rstd_T = torch.empty_like(mean_T)
    rows_per_program, num_warps = tile
    if num_rows:
        _forward[(triton.cdiv(num_rows, rows_per_program),)](
            x_TF,
            x_bias_F,
            residual_TF,
            new_residual_TF,
            weight_F,
            bias_F,
            y_TF,
            mean_T,
            rstd_T,
            dropout.key if dropout else None,
            num_rows,
            dropout.first_slot if dropout else 0,
            dropout.threshold if dropout else 0,
            dropout.scale if dropout else 1.0,
            eps,
            NUM_FEATURES=num_features,
            ROWS=rows_per_program,
            # `keep_tile` draws words for four columns at a time.
            BLOCK=max(4, triton.next_power_of_2(num_features)),
            num_warps=num_warps,
        )
    return new_residual_TF, y_TF, mean_T, rstd_T
