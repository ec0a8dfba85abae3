"""The backward kernel: all gradients of bias, dropout, residual addition and LayerNorm in one pass.

With xhat = (new_residual - mean) * rstd and g = d_y * weight, per row over F features:

    d_sum = d_new_residual + rstd * (g - mean(g) - xhat * mean(g * xhat))      the residual's gradient
    d_x = keep / (1 - p) * d_sum                                               the mask drawn again
    d_weight = sum over rows of d_y * xhat,  d_bias = sum of d_y,  d_x_bias = sum of d_x

A fixed number of programs walks over the rows; each keeps its three column sums in registers (fp32) and
writes them once, [program, sum, feature]; `column_sum` adds the programs up. Without dropout d_x is d_sum
itself and is not written twice; without the norm d_sum is what came in.

A tensor of Triton has a power of two of columns, and a row has not: beyond 4,096 features it is cut into
chunks, each a tensor of its own in a tuple, so that few lanes are idle. Three sums of more than 9,216
features do not fit the registers of a program. Such rows are cut into parts as well: a program owns the
chunks of one, and of the other it reads what the two means need; both run at the same time, so what one has
fetched the other finds in the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..column_sum import column_sum
from ..launch import num_multiprocessors
from ..philox_triton import keep_tile
from .forward import Dropout


@triton.jit
def _columns(part, chunk, NUM_FEATURES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """First column of a chunk of a part, its columns [BLOCK], and which of these there are."""
    first = (part * CHUNKS + chunk) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    return first, columns, columns < NUM_FEATURES


@triton.jit
def _box(rows, in_rows, columns, in_features, NUM_FEATURES: tl.constexpr):
    """Offsets of the elements of rows x columns, [ROWS, BLOCK], and which of them there are."""
    offsets = rows.to(tl.int64)[:, None] * NUM_FEATURES + columns[None, :]
    return offsets, in_rows[:, None] & in_features[None, :]


@triton.jit
def _zeros(CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """One sum over rows: fp32 [BLOCK] for each chunk."""
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    return sums


@triton.jit
def _terms(d_y_ptr, normed_ptr, weight, mean, rstd, offsets, mask):
    """d_y, xhat and g of a chunk, fp32 [ROWS, BLOCK] each."""
    d_y = tl.load(d_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    normed = tl.load(normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Rows past the end read zeros and rstd 0, so they add nothing; columns past it are not stored.
    return d_y, (normed - mean[:, None]) * rstd[:, None], d_y * weight[None, :]


@triton.jit
def _norm(
    d_y_ptr, normed_ptr, mean_ptr, rstd_ptr, weight_ptr, weight, d_weight, d_bias, rows, in_rows, part,
    NUM_FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The sums d_weight and d_bias with these rows in them, and of the part's own chunks
    rstd * (g - mean(g) - xhat * mean(g * xhat)). Tuples of chunks."""
    mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)  # [ROWS]
    rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    # Chunks are added up feature by feature first: summing a tile has all warps wait for one another.
    sum_g = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_gx = tl.zeros([ROWS, BLOCK], tl.float32)
    new_d_weight, new_d_bias, own_g, own_xhat = (), (), (), ()
    # Its own part first: so each adds in another order, and its means may differ in the last bit.
    for step in tl.static_range(PARTS):
        for chunk in tl.static_range(CHUNKS):
            _, columns, in_features = _columns((part + step) % PARTS, chunk, NUM_FEATURES, CHUNKS, BLOCK)
            offsets, mask = _box(rows, in_rows, columns, in_features, NUM_FEATURES)
            # A row of one chunk has registers for the weight; else it comes from the L2 cache each time.
            if CHUNKS * PARTS > 1:
                weight = tl.load(weight_ptr + columns, mask=in_features, other=0.0).to(tl.float32)
            d_y, xhat, g = _terms(d_y_ptr, normed_ptr, weight, mean, rstd, offsets, mask)
            sum_g += g
            sum_gx += g * xhat
            if step == 0:
                new_d_weight = new_d_weight + (d_weight[chunk] + tl.sum(d_y * xhat, axis=0),)
                new_d_bias = new_d_bias + (d_bias[chunk] + tl.sum(d_y, axis=0),)
                own_g, own_xhat = own_g + (g,), own_xhat + (xhat,)
    mean_g = tl.sum(sum_g, axis=1) * (1.0 / NUM_FEATURES)
    mean_gx = tl.sum(sum_gx, axis=1) * (1.0 / NUM_FEATURES)
    gradient = ()
    for chunk in tl.static_range(CHUNKS):
        centred = own_g[chunk] - mean_g[:, None] - own_xhat[chunk] * mean_gx[:, None]
        gradient = gradient + (rstd[:, None] * centred,)
    return new_d_weight, new_d_bias, gradient


@triton.jit(do_not_specialize=["first_slot", "threshold"])
def _backward(
    d_y_ptr,  # [T, F], or None where there is no norm or nobody used it, like the next five
    normed_ptr,  # [T, F], what was normalised
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    weight_ptr,  # [F]
    d_sum_ptr,  # [T, F], written
    d_new_residual_ptr,  # [T, F], or None when nobody used the sum but the norm
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
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    part = tl.program_id(1) if PARTS > 1 else 0
    # Over all rows of the program: the registers that decide how wide a part may be.
    d_weight, d_bias, d_x_bias = _zeros(CHUNKS, BLOCK), _zeros(CHUNKS, BLOCK), _zeros(CHUNKS, BLOCK)
    weight = 0.0
    if d_y_ptr is not None and CHUNKS * PARTS == 1:
        _, columns, in_features = _columns(part, 0, NUM_FEATURES, CHUNKS, BLOCK)
        weight = tl.load(weight_ptr + columns, mask=in_features, other=0.0).to(tl.float32)

    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)  # [ROWS]
        in_rows = rows < num_rows
        if d_y_ptr is not None:
            d_weight, d_bias, gradient = _norm(
                d_y_ptr, normed_ptr, mean_ptr, rstd_ptr, weight_ptr, weight, d_weight, d_bias, rows, in_rows,
                part, NUM_FEATURES, ROWS, BLOCK, CHUNKS, PARTS,
            )  # fmt: skip
        new_d_x_bias = ()
        for chunk in tl.static_range(CHUNKS):
            first_column, columns, in_features = _columns(part, chunk, NUM_FEATURES, CHUNKS, BLOCK)
            offsets, mask = _box(rows, in_rows, columns, in_features, NUM_FEATURES)
            d_sum = tl.zeros([ROWS, BLOCK], tl.float32)
            if d_new_residual_ptr is not None:
                d_sum = tl.load(d_new_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if d_y_ptr is not None:
                d_sum += gradient[chunk]
                tl.store(d_sum_ptr + offsets, d_sum.to(d_sum_ptr.dtype.element_ty), mask=mask)
            if key_ptr is not None:
                keep = keep_tile(tl.load(key_ptr), threshold, first_slot + rows, first_column, 0, BLOCK)
                # From here on d_sum is d_x: the bias was added before the dropout.
                d_sum = tl.where(keep, d_sum * scale, 0.0)
                tl.store(d_x_ptr + offsets, d_sum.to(d_x_ptr.dtype.element_ty), mask=mask)
            if BIAS:
                new_d_x_bias = new_d_x_bias + (d_x_bias[chunk] + tl.sum(d_sum, axis=0),)
        if BIAS:
            d_x_bias = new_d_x_bias

    # [programs, NUM_SUMS, F], in the order that `run_backward` promises.
    NUM_SUMS: tl.constexpr = (2 if d_y_ptr is not None else 0) + (1 if BIAS else 0)
    for chunk in tl.static_range(CHUNKS):
        _, columns, in_features = _columns(part, chunk, NUM_FEATURES, CHUNKS, BLOCK)
        out_ptr = partials_ptr + tl.program_id(0) * NUM_SUMS * NUM_FEATURES + columns
        if d_y_ptr is not None:
            tl.store(out_ptr, d_weight[chunk], mask=in_features)
            tl.store(out_ptr + NUM_FEATURES, d_bias[chunk], mask=in_features)
            out_ptr += 2 * NUM_FEATURES
        if BIAS:
            tl.store(out_ptr, d_x_bias[chunk], mask=in_features)


class Tile(NamedTuple):
    """The sizes of a launch."""

    rows: int
    """Rows per step."""
    num_warps: int
    programs: int
    """Per multiprocessor."""
    num_stages: int
    """Steps loaded ahead."""
    block: int
    """Columns of a chunk."""
    parts: int
    """Of a row."""


def backward_tile(num_features: int, element_size: int) -> Tile:
    """The sizes for a width, measured on an H100 with the widths of OPT.

    More warps than a row feeds with 16-byte loads would share columns and have to exchange their sums at
    every step. Rows are loaded ahead while three stages of three tensors fit shared memory. At OPT's widths
    no register of a 16-bit kernel is spilled.
    """
    if num_features > 4096:
        # 2,048 columns are a 16-byte load of each of 8 warps. 9,216 are five of those, which spill, or nine
        # of half the width.
        block, parts = (1024, 1) if 8192 < num_features <= 9216 else (2048, triton.cdiv(num_features, 9216))
        return Tile(1, 8, 1, 3 if element_size == 2 else 1, block, parts)
    # Rows of a step share 16 KiB of one tensor, four rows at most; see above for the rest. At least four
    # columns: `keep_tile` draws so many words at a time.
    block = max(4, triton.next_power_of_2(num_features))
    num_warps = min(max(block // 256, 1), 8)
    rows = max(1, min(16384 // (block * element_size), 4))
    return Tile(rows, num_warps, 8 // num_warps, 3, block, 1)


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
        d_y_TF: gradient of y, [..., features], contiguous; None where there is no norm, or nobody used it.
        d_new_residual_TF: likewise of what was normalised; None when nobody used that.
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
    # One even without rows, whose zeros `column_sum` reads; no more than run at once.
    num_programs = max(
        1,
        min(
            triton.cdiv(num_rows, tile.rows),
            tile.programs * num_multiprocessors(like_TF.device) // tile.parts,
        ),
    )
    partials_PKF = torch.empty(
        num_programs, num_sums, num_features, dtype=torch.float32, device=like_TF.device
    )
    _backward[(num_programs, tile.parts)](
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
        ROWS=tile.rows,
        BLOCK=tile.block,
        STAGES=tile.num_stages,
        CHUNKS=triton.cdiv(num_features, tile.parts * tile.block),
        PARTS=tile.parts,
        num_warps=tile.num_warps,
        # g - mean(g) cancels only if both see the same g: no product may hide unrounded in a sum.
        enable_fp_fusion=False,
    )
    return d_sum_TF, d_x_TF, column_sum(partials_PKF, like_TF.dtype) if num_sums else None
