"""Forward and backward of relu(x + bias), a tile of rows and columns at a time.

    forward    y = max(x + bias, 0)                          x read, y written
    backward   d_x = d_y where y > 0, else 0                 d_y and y read, d_x written
               d_bias = sum over rows of d_x                 fp32, one partial row per strip of rows

The output's own sign says where the gradient passes, and the next projection keeps the output anyway: nothing
else is saved. NaN passes both ways, as in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..column_sum import column_sum
from ..launch import num_multiprocessors


@triton.jit
def _forward(
    x_ptr,  # [T, F]
    bias_ptr,  # [F]
    y_ptr,  # [T, F], written
    num_rows,  # T
    NUM_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_features = columns < NUM_FEATURES
    mask = (rows < num_rows)[:, None] & in_features[None, :]
    offsets = rows.to(tl.int64)[:, None] * NUM_FEATURES + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=in_features, other=0.0).to(tl.float32)
    total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]  # [ROWS, COLUMNS]
    # Not maximum(): this comparison lets NaN through.
    y = tl.where(total <= 0.0, 0.0, total)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    d_y_ptr,  # [T, F]
    y_ptr,  # [T, F], what the forward returned: the input is gone
    d_x_ptr,  # [T, F], written
    partials_ptr,  # fp32 [strips, F], written
    num_rows,  # T
    NUM_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_features = columns < NUM_FEATURES
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Which rows a program has follows from the grid alone, and so does the order in which it adds them up.
    for first in range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & in_features[None, :]
        offsets = rows.to(tl.int64)[:, None] * NUM_FEATURES + columns[None, :]
        # Beyond the last row y reads as 0 and stops the gradient: `d_bias` needs no mask.
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d_x = tl.where(y <= 0.0, 0.0, d_y)  # [ROWS, COLUMNS]
        tl.store(d_x_ptr + offsets, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        # In fp32: rounded is only what is stored.
        d_bias += d_x
    strip = tl.program_id(1) * NUM_FEATURES
    tl.store(partials_ptr + strip + columns, tl.sum(d_bias, axis=0), mask=in_features)


FORWARD_TILE = (2, 1024, 4)
BACKWARD_TILE = (8, 1024, 8, 2)
"""Rows, columns, warps, and in the backward programs per multiprocessor, measured on an H100."""


def run_forward(x_TF: Tensor, bias_F: Tensor, tile: tuple[int, int, int] = FORWARD_TILE) -> Tensor:
    """Launch the forward on [rows, features]."""
    num_rows, num_features = x_TF.shape
    rows, columns, num_warps = tile
    # CUDA takes 65,535 programs on the second axis: 131,070 rows with these tiles.
    y_TF = torch.empty_like(x_TF)
    if num_rows:
        _forward[(triton.cdiv(num_features, columns), triton.cdiv(num_rows, rows))](
            x_TF,
            bias_F,
            y_TF,
            num_rows,
            NUM_FEATURES=num_features,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=num_warps,
        )
    return y_TF


def run_backward(
    d_y_TF: Tensor, y_TF: Tensor, tile: tuple[int, int, int, int] = BACKWARD_TILE
) -> tuple[Tensor, Tensor]:
    """Launch the backward on [rows, features]; returns d_x and d_bias."""
    num_rows, num_features = y_TF.shape
    rows, columns, num_warps, programs_per_multiprocessor = tile
    column_blocks = triton.cdiv(num_features, columns)
    # Few enough to run all at once: each more is a partial row to write and to read again.
    wanted_strips = programs_per_multiprocessor * num_multiprocessors(y_TF.device) // column_blocks
    # One even without rows: somebody has to write the zeros that `column_sum` reads.
    strips = max(1, min(triton.cdiv(num_rows, rows), wanted_strips))
    d_x_TF = torch.empty_like(y_TF)
    partials_SF = torch.empty(strips, num_features, dtype=torch.float32, device=y_TF.device)
    _backward[(column_blocks, strips)](
        d_y_TF,
        y_TF,
        d_x_TF,
        partials_SF,
        num_rows,
        NUM_FEATURES=num_features,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return d_x_TF, column_sum(partials_SF, y_TF.dtype)
