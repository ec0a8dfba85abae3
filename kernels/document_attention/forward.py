"""Forward kernel: one program computes the output of one query tile of one head with an online softmax.

What enters: the fused projection, the tile schedule, `end`. What leaves: out [T, H, D] and, for the backward,
log2 of the sum of exp2 of the scaled scores, lse2 [H, T] (+inf in a row that sees nothing).

Scores are taken in units of log 2, so that exp2 serves: scale2 = softmax_scale * log2(e). With scores 3 and 1
(in these units) a row has lse2 = log2(8 + 2) = 3.32 and probabilities 2^(3 - 3.32) = 0.8 and 0.2.

The product of probabilities and values runs over whole tiles, and 0 * NaN is NaN. So where the output of a
tile holds a NaN it is computed once more with every value that is not finite taken out; the rows that do see
such a value become NaN afterwards. Nobody pays for this but tiles that meet a NaN.

R rows of a query tile, C columns of a key tile, D head size in the tile (a power of two).
"""

import triton
import triton.language as tl

from ..philox_triton import keep_tile
from .tiles import holds_nan, load_tile, store_tile, zero_where_not_finite


@triton.jit
def _attend(
    q_RD, k_ptr, v_ptr, stride_t, end_ptr, key_tiles_ptr, num_key_tiles, first_row, tokens, scale2,
    dropout_key, keep_threshold, head,
    C: tl.constexpr, HEAD_DIM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SANITISE: tl.constexpr,
):  # fmt: skip
    """Return the unnormalised output [R, D], the sums of probabilities [R] and the largest score [R]."""
    R: tl.constexpr = q_RD.shape[0]
    D: tl.constexpr = q_RD.shape[1]
    rows_R = first_row + tl.arange(0, R)
    # Finite, so that a row that has seen nothing yet computes exp2(-inf - largest) = 0, not NaN.
    largest_R = tl.full([R], -1.0e30, tl.float32)
    sum_R = tl.zeros([R], tl.float32)
    out_RD = tl.zeros([R, D], tl.float32)
    spoilt_R = tl.zeros([R], tl.int32)
    for index in range(num_key_tiles):
        entry = tl.load(key_tiles_ptr + index)
        first_column = (entry >> 1) * C
        columns_C = first_column + tl.arange(0, C)
        k_CD = load_tile(k_ptr, stride_t, first_column, tokens, C, D, HEAD_DIM)
        scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION)
        if entry & 1:
            end_C = tl.load(end_ptr + columns_C, mask=columns_C < tokens, other=0)
            sees_RC = (columns_C[None, :] <= rows_R[:, None]) & (rows_R[:, None] < end_C[None, :])
            scores_RC = tl.where(sees_RC, scores_RC, float("-inf"))
        new_largest_R = tl.maximum(largest_R, tl.max(scores_RC, axis=1) * scale2)
        probabilities_RC = tl.exp2(scores_RC * scale2 - new_largest_R[:, None])
        shrink_R = tl.exp2(largest_R - new_largest_R)
        sum_R = sum_R * shrink_R + tl.sum(probabilities_RC, axis=1)
        largest_R = new_largest_R
        if DROPOUT:
            keep_RC = keep_tile(dropout_key, keep_threshold, rows_R, first_column, head, C)
            probabilities_RC = tl.where(keep_RC, probabilities_RC, 0.0)
        v_CD = load_tile(v_ptr, stride_t, first_column, tokens, C, D, HEAD_DIM)
        if SANITISE:
            v_CD, spoilt_C = zero_where_not_finite(v_CD)
            end_C = tl.load(end_ptr + columns_C, mask=columns_C < tokens, other=0)
            sees_RC = (columns_C[None, :] <= rows_R[:, None]) & (rows_R[:, None] < end_C[None, :])
            spoilt_R = tl.maximum(spoilt_R, tl.max((sees_RC & spoilt_C[None, :]).to(tl.int32), axis=1))
        out_RD = out_RD * shrink_R[:, None]
        out_RD = tl.dot(probabilities_RC.to(v_CD.dtype), v_CD, out_RD, input_precision=PRECISION)
    if SANITISE:
        out_RD = tl.where(spoilt_R[:, None] != 0, float("nan"), out_RD)
    return out_RD, sum_R, largest_R


@triton.jit
def _forward(
    qkv_ptr,  # [T, H, 3, D], any strides of T, H and 3
    out_ptr,  # [T, H, D] contiguous
    lse2_ptr,  # fp32 [H, T]
    end_ptr,  # int32 [T]
    key_tiles_ptr,  # int32 [Q, K], TileSchedule
    num_key_tiles_ptr,  # int32 [Q]
    order_ptr,  # int32 [Q]
    dropout_key_ptr,  # int64 []
    stride_t, stride_h, stride_3, key_tiles_stride, tokens,
    scale2, keep_threshold, keep_scale, first_head,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: the heads of a slot lie side by side in memory.
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tile = tl.load(order_ptr + tl.program_id(1))
    first_row = tile * R
    q_ptr = qkv_ptr + head * stride_h
    k_ptr, v_ptr = q_ptr + stride_3, q_ptr + 2 * stride_3
    q_RD = load_tile(q_ptr, stride_t, first_row, tokens, R, D, HEAD_DIM)
    key_tiles_ptr += tile.to(tl.int64) * key_tiles_stride
    num_key_tiles = tl.load(num_key_tiles_ptr + tile)
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    plane = (first_head + head).to(tl.int32)
    out_RD, sum_R, largest_R = _attend(
        q_RD, k_ptr, v_ptr, stride_t, end_ptr, key_tiles_ptr, num_key_tiles, first_row, tokens, scale2,
        dropout_key, keep_threshold, plane, C, HEAD_DIM, DROPOUT, PRECISION, False,
    )  # fmt: skip
    if holds_nan(out_RD):
        out_RD, sum_R, largest_R = _attend(
            q_RD, k_ptr, v_ptr, stride_t, end_ptr, key_tiles_ptr, num_key_tiles, first_row, tokens, scale2,
            dropout_key, keep_threshold, plane, C, HEAD_DIM, DROPOUT, PRECISION, True,
        )  # fmt: skip
    blind_R = sum_R == 0.0
    sum_R = tl.where(blind_R, 1.0, sum_R)
    out_RD = out_RD * (keep_scale / sum_R)[:, None]
    store_tile(out_ptr + head * HEAD_DIM, heads * HEAD_DIM, first_row, tokens, out_RD, HEAD_DIM)
    rows_R = first_row + tl.arange(0, R)
    lse2_R = tl.where(blind_R, float("inf"), largest_R + tl.log2(sum_R))
    tl.store(lse2_ptr + head * tokens + rows_R, lse2_R, mask=rows_R < tokens)
