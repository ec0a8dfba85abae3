"""The backward kernel: all gradients of bias, dropout, residual addition and LayerNorm in one pass.

With xhat = (new_residual - mean) * rstd and g = d_y * weight, per row over F features:

    d_sum = d_new_residual + rstd * (g - mean(g) - xhat * mean(g * xhat))      the residual's gradient
    d_x = keep / (1 - p) * d_sum                                               the mask drawn again
    d_weight = sum over rows of d_y * xhat,  d_bias = sum of d_y,  d_x_bias = sum of d_x

A fixed number of programs walks over the rows; each keeps its three column sums in registers (fp32) and
writes them once, [program, sum, feature]; `column_sum` adds the programs up. Without dropout d_x is d_sum
itself and is not written twice; without the norm d_sum is what came in.

Three sums of a row of more than 8,192 features do not fit the registers of a program, so such rows are cut
into parts of the columns. A program owns one part, and of the others it reads what the two means need;
programs of the same rows run at the same time, so what one has fetched the others find in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..column_sum import column_sum
from ..launch import num_multiprocessors
from ..philox_triton import keep_tile
from .forward import Dropout


# Asked by the kernel and by its launch, whose BLOCK has to hold what the kernel takes for a part.
@triton.constexpr_function
def _width(num_features, num_parts):
    """Columns of a part: whole 16-byte loads, and whole groups of four of a dropout mask."""
    return num_features if num_parts == 1 else triton.cdiv(triton.cdiv(num_features, num_parts), 8) * 8


@triton.jit
def _part_columns(part, NUM_FEATURES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """First column of a part, its columns [BLOCK], and which of these it has."""
    lanes = tl.arange(0, BLOCK)  # [BLOCK]: WIDTH rounded up to a power of two
    if PARTS == 1:
        return 0, lanes, lanes < NUM_FEATURES
    WIDTH: tl.constexpr = _width(NUM_FEATURES, PARTS)
    # Beyond its width a block reaches into the next part, which another program owns.
    columns = part * WIDTH + lanes
    return part * WIDTH, columns, (lanes < WIDTH) & (columns < NUM_FEATURES)


@triton.jit
def _part_terms(
    d_y_ptr, normed_ptr, weight_ptr, mean, rstd, rows, in_rows, part,
    NUM_FEATURES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g and g * xhat of a part that is not the program's own, each [ROWS, BLOCK]."""
    _, columns, in_features = _part_columns(part, NUM_FEATURES, PARTS, BLOCK)
    mask = in_rows[:, None] & in_features[None, :]
    offsets = rows.to(tl.int64)[:, None] * NUM_FEATURES + columns[None, :]
    weight = tl.load(weight_ptr + columns, mask=in_features, other=0.0).to(tl.float32)  # [BLOCK]
    # [ROWS, BLOCK]; the same terms as in the loop of `_backward`: the parts of a row share its two means.
    g = tl.load(d_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    normed = tl.load(normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return g, g * ((normed - mean[:, None]) * rstd[:, None])


@triton.jit(do_not_specialize=["first_slot", "threshold"])
def _backward(
    d_y_ptr,  # [T, F], or None without the norm, like the next five
    normed_ptr,  # [T, F], what was normalised
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    weight_ptr,  # [F]
    d_sum_ptr,  # [T, F], written
    d_new_residual_ptr,  # [T, F], or None when nothing was added: then the sum is the norm's input itself
    d_x_ptr,  # [T, F], written; None without dropout
    key_ptr,  # int64 [], or None without dropout
    partials_ptr,  # fp32 [programs, K, F]: d_weight and d_bias if normed, d_x_bias if BIAS
    num_rows,  # T
    first_slot,  # as in the forward, or the mask would be another
    threshold,
    scale,
    BIAS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    part = tl.program_id(1) if PARTS > 1 else 0
    first_column, columns, in_features = _part_columns(part, NUM_FEATURES, PARTS, BLOCK)
    # [BLOCK] each, over all rows of the program: the registers that decide how wide a part may be.
    d_weight = tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    d_x_bias = tl.zeros([BLOCK], tl.float32)
    if d_y_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=in_features, other=0.0).to(tl.float32)

    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)  # [ROWS]
        mask = (rows < num_rows)[:, None] & in_features[None, :]
        offsets = rows.to(tl.int64)[:, None] * NUM_FEATURES + columns[None, :]
        d_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        if d_new_residual_ptr is not None:
            d_sum = tl.load(d_new_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if d_y_ptr is not None:
            d_y = tl.load(d_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
            normed = tl.load(normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)  # [ROWS]
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
            xhat = (normed - mean[:, None]) * rstd[:, None]
            # Rows past the end read zeros and rstd 0, so they add nothing; columns past it are not stored.
            d_weight += tl.sum(d_y * xhat, axis=0)
            d_bias += tl.sum(d_y, axis=0)
            g = d_y * weight[None, :]
            # Parts are added up feature by feature first: summing a tile has all warps wait for one another.
            terms_g, terms_gx = g, g * xhat
            # Every part adds the others in another order: its means may differ from theirs in the last bit.
            for step in tl.static_range(1, PARTS):
                other_g, other_gx = _part_terms(
                    d_y_ptr, normed_ptr, weight_ptr, mean, rstd, rows, rows < num_rows,
                    (part + step) % PARTS, NUM_FEATURES, PARTS, BLOCK,
                )  # fmt: skip
                terms_g += other_g
                terms_gx += other_gx
            mean_g = tl.sum(terms_g, axis=1) * (1.0 / NUM_FEATURES)
            mean_gx = tl.sum(terms_gx, axis=1) * (1.0 / NUM_FEATURES)
            d_sum += rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
            tl.store(d_sum_ptr + offsets, d_sum.to(d_sum_ptr.dtype.element_ty), mask=mask)
        if key_ptr is not None:
            # `first_column` divides by 8 (`_width`), as a group of four words needs.
            keep = keep_tile(tl.load(key_ptr), threshold, first_slot + rows, first_column, 0, BLOCK)
            # From here on d_sum is d_x: the bias was added before the dropout.
            d_sum = tl.where(keep, d_sum * scale, 0.0)
            tl.store(d_x_ptr + offsets, d_sum.to(d_x_ptr.dtype.element_ty), mask=mask)
        if BIAS:
            d_x_bias += tl.sum(d_sum, axis=0)

    # [programs, NUM_SUMS, F], in the order that `run_backward` promises.
    NUM_SUMS: tl.constexpr = (2 if d_y_ptr is not None else 0) + (1 if BIAS else 0)
    out_ptr = partials_ptr + tl.program_id(0) * NUM_SUMS * NUM_FEATURES + columns
    if d_y_ptr is not None:
        tl.store(out_ptr, d_weight, mask=in_features)
        tl.store(out_ptr + NUM_FEATURES, d_bias, mask=in_features)
        out_ptr += 2 * NUM_FEATURES
    if BIAS:
        tl.store(out_ptr, d_x_bias, mask=in_features)


Tile = tuple[int, int, int, int, int]
"""Rows per step, warps, programs per multiprocessor, steps loaded ahead, parts of a row."""


def backward_tile(num_features: int, element_size: int) -> Tile:
    """The sizes for a width, measured on an H100; beyond 8,192 features with 9,216 and 12,288 only.

    More warps than a row feeds with 16-byte loads would share columns and have to exchange their sums at
    every step. Rows are loaded ahead while three stages of three tensors fit shared memory. Parts of 4,096
    columns take 195 registers at most, none spilled, where an uncut row of 12,288 spills 432 bytes a thread.
    """
    if num_features > 8192:
        return 1, 8, 1, 3 if element_size == 2 else 2, triton.cdiv(num_features, 4096)
    # Rows of a step share 16 KiB of one tensor, four rows at most; see above for the rest.
    block = triton.next_power_of_2(num_features)
    row_bytes = block * element_size
    num_warps = min(max(block // 256, 1), 8)
    return max(1, min(16384 // row_bytes, 4)), num_warps, 8 // num_warps, 3 if row_bytes <= 16384 else 1, 1


def run_backward(
    d_y_TF: Tensor | None,
    d_new_residual_TF: Tensor | None,
    normed: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    has_bias: bool,
    dropout: Dropout | None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the backward.

    Args:
        d_y_TF: gradient of y, [..., features], contiguous; None without the norm.
        d_new_residual_TF: likewise; None when nothing was added.
        normed: what was normalised, its mean and rstd, and the weight.
        has_bias: whether the column sum of d_x is wanted.
        tile: see `backward_tile`.

    Returns:
        d_residual, d_x (the same tensor without dropout), and the column sums [K, F]: d_weight and d_bias if
        normed, then d_x_bias if has_bias; None if neither.
    """
    like_TF = d_y_TF if d_y_TF is not None else d_new_residual_TF
    assert like_TF is not None, "neither y nor new_residual has a gradient"
    num_features = like_TF.shape[-1]
    num_rows = like_TF.numel() // num_features
    normed_TF, mean_T, rstd_T, weight_F = normed if normed is not None else (None, None, None, None)
    # Without the norm or without dropout a gradient is only passed on: no memory, no copy.
    d_sum_TF = torch.empty_like(like_TF) if normed is not None else like_TF
    d_x_TF = torch.empty_like(like_TF) if dropout is not None else d_sum_TF
    num_sums = (2 if normed is not None else 0) + has_bias
    rows_per_step, num_warps, programs_per_multiprocessor, num_stages, num_parts = tile
    # One even without rows, whose zeros `column_sum` reads; no more than run at once.
    num_programs = max(
        1,
        min(
            triton.cdiv(num_rows, rows_per_step),
            programs_per_multiprocessor * num_multiprocessors(like_TF.device) // num_parts,
        ),
    )
    partials_PKF = torch.empty(
        num_programs, num_sums, num_features, dtype=torch.float32, device=like_TF.device
    )
    _backward[(num_programs, num_parts)](
        d_y_TF,
        normed_TF,
        mean_T,
        rstd_T,
        weight_F,
        d_sum_TF if normed is not None else None,
        d_new_residual_TF,
        d_x_TF if dropout is not None else None,
        dropout.key if dropout is not None else None,
        partials_PKF,
        num_rows,
        dropout.first_slot if dropout is not None else 0,
        dropout.threshold if dropout is not None else 0,
        dropout.scale if dropout is not None else 1.0,
        BIAS=has_bias,
        NUM_FEATURES=num_features,
        ROWS=rows_per_step,
        BLOCK=max(4, triton.next_power_of_2(_width(num_features, num_parts))),
        STAGES=num_stages,
        PARTS=num_parts,
        num_warps=num_warps,
        # g - mean(g) cancels only if both see the same g: no product may hide unrounded in a sum.
        enable_fp_fusion=False,
    )
    return d_sum_TF, d_x_TF, column_sum(partials_PKF, like_TF.dtype) if num_sums else None
