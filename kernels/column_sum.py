"""Sums of columns in an order that never changes: the second half of every bias gradient.

A backward kernel runs a fixed number of programs; each adds up its own rows in fp32 and writes one partial
row. Here the partial rows become one. No atomics, so a repeat is equal bit for bit on the same kind of GPU.

    partials [[1, 2], [3, 4], [5, 6]]  ->  [9, 12]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _column_sum(
    partials_ptr,  # fp32 [P, C]
    out_ptr,  # [C]
    num_partials,  # P
    num_columns,  # C, all trailing dimensions as one
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    in_columns = (columns < num_columns)[None, :]
    # [BLOCK_P, BLOCK_C]: rows BLOCK_P apart are added first, then the block's own. That order decides the
    # last bits of every bias gradient: another BLOCK_P is another result.
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, num_partials, BLOCK_P):
        rows = (first + tl.arange(0, BLOCK_P))[:, None]
        offsets = rows.to(tl.int64) * num_columns + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=(rows < num_partials) & in_columns, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, axis=0), mask=columns < num_columns)


def column_sum(partials_PC: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up dimension 0 of a contiguous fp32 tensor [P, ...] and round once to `dtype`."""
    num_partials = partials_PC.shape[0]
    out = torch.empty(partials_PC.shape[1:], dtype=dtype, device=partials_PC.device)
    num_columns = out.numel()
    block_columns = 32  # one 128-byte line of fp32: enough programs to fill the chip with few columns
    grid = (triton.cdiv(num_columns, block_columns),)
    _column_sum[grid](partials_PC, out, num_partials, num_columns, BLOCK_P=64, BLOCK_C=block_columns)
    return out
