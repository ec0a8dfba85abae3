"""Forward kernel: one program computes the output of one query tile of one head with an online softmax.

What enters: the fused projection, the tile schedule, `end`. What leaves: out [T, H, D] and, for the backward,
log2 of the sum of exp2 of the scaled scores, lse2 [H, T rounded up to whole tiles] (+inf in a row that sees
nothing, anything beyond T).

Scores are taken in units of log 2, so that exp2 serves: scale2 = softmax_scale * log2(e). With scores 3 and 1
(in these units) a row has lse2 = log2(8 + 2) = 3.32 and probabilities 2^(3 - 3.32) = 0.8 and 0.2.

The product of probabilities and values runs over whole tiles, and 0 * NaN is NaN. So `_forward` makes lse2
NaN where the output came out so, and `_repair_forward`, which otherwise ends at once, computes such a tile
once more with every value that is not finite taken out; the rows that do see such a value become NaN
afterwards. It is a kernel of its own because its code would take registers from the other.

T slots, H heads, R rows of a query tile, C columns of a key tile, D head size in the tile.
"""

import triton
import triton.language as tl

from ..philox_triton import keep_tile
from .tiles import load_part, nan_rows, sees_any, store_tile, visible, zero_where_not_finite


@triton.jit
def _attend(
    q_RD, qkv, stride_h, stride_3, end_ptr, key_tiles_ptr, num_key_tiles, first_row, tokens, scale2,
    dropout_key, keep_threshold, head, plane,
    C: tl.constexpr, FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    REPAIR: tl.constexpr, MASK_ALL: tl.constexpr,
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
        entry = tl.load(key_tiles_ptr + index)  # 2 * tile + (1 if some pair is masked)
        first_column = (entry >> 1) * C
        columns_C = first_column + tl.arange(0, C)
        k_CD = load_part(qkv, stride_h, stride_3, first_column, head, 1, C, D, FLAT)
        scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION)
        if MASK_ALL | ((entry & 1) != 0):
            sees_RC = visible(rows_R, columns_C, end_ptr, tokens)
            scores_RC = tl.where(sees_RC, scores_RC, float("-inf"))
        # A NaN among the scores is lost here, but not in the sum: its probability is NaN.
        new_largest_R = tl.maximum(largest_R, tl.max(scores_RC, axis=1) * scale2)
        probabilities_RC = tl.exp2(scores_RC * scale2 - new_largest_R[:, None])
        shrink_R = tl.exp2(largest_R - new_largest_R)
        sum_R = sum_R * shrink_R + tl.sum(probabilities_RC, axis=1)
        largest_R = new_largest_R
        # After the sum: a softmax is over all that a row sees, kept or not.
        if DROPOUT:
            keep_RC = keep_tile(dropout_key, keep_threshold, rows_R, first_column, plane, C)
            probabilities_RC = tl.where(keep_RC, probabilities_RC, 0.0)
        v_CD = load_part(qkv, stride_h, stride_3, first_column, head, 2, C, D, FLAT)
        if REPAIR:
            v_CD, spoilt_C = zero_where_not_finite(v_CD)
            spoilt_R = sees_any(visible(rows_R, columns_C, end_ptr, tokens), spoilt_C, spoilt_R)
        out_RD = out_RD * shrink_R[:, None]
        # None is above 1, since the largest score is taken off: they fit fp16 before they are normalised.
        out_RD = tl.dot(probabilities_RC.to(v_CD.dtype), v_CD, out_RD, input_precision=PRECISION)
    if REPAIR:
        out_RD = tl.where(spoilt_R[:, None] != 0, float("nan"), out_RD)
    return out_RD, sum_R, largest_R


@triton.jit
def _forward_tile(
    qkv_queries, qkv_keys, out, out_ptr, lse2_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr,
    dropout_key_ptr,
    stride_h, stride_3, key_tiles_stride, lse2_stride, tokens, scale2, keep_threshold, keep_scale, first_head,
    tile, head, heads,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
    MASK_ALL: tl.constexpr,
):  # fmt: skip
    """Write a tile of the output and its lse2."""
    first_row = tile * R
    num_key_tiles = tl.load(num_key_tiles_ptr + tile)
    key_tiles_ptr += tl.cast(tile, tl.int64) * key_tiles_stride
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    q_RD = load_part(qkv_queries, stride_h, stride_3, first_row, head, 0, R, D, FLAT)
    out_RD, sum_R, largest_R = _attend(
        q_RD, qkv_keys, stride_h, stride_3, end_ptr, key_tiles_ptr, num_key_tiles, first_row, tokens, scale2,
        dropout_key, keep_threshold, head, first_head + head, C, FLAT, DROPOUT, PRECISION, REPAIR, MASK_ALL,
    )  # fmt: skip
    # Padding, or scores of -inf: else the largest score's own term is 1. Below -1e30 they count as -inf.
    blind_R = sum_R == 0.0
    sum_R = tl.where(blind_R, 1.0, sum_R)
    # 1 / (1 - p) once, on the output.
    out_RD = out_RD * (keep_scale / sum_R)[:, None]
    store_tile(out, out_ptr, heads * HEAD_DIM, first_row, head * HEAD_DIM, tokens, out_RD, HEAD_DIM)
    rows_R = first_row + tl.arange(0, R)
    # +inf: the backward's exp2(score - lse2) is 0 in such a row, masked or not.
    lse2_R = tl.where(blind_R, float("inf"), largest_R + tl.log2(sum_R))
    # The mark that `_repair_forward` looks for, and overwrites with the number that the backward needs.
    if not REPAIR:
        lse2_R = tl.where(nan_rows(out_RD), float("nan"), lse2_R)
    tl.store(lse2_ptr + tl.cast(head, tl.int64) * lse2_stride + rows_R, lse2_R, mask=rows_R < lse2_stride)


@triton.jit
def _forward(
    qkv_queries,  # descriptor of the projection [T, H, 3, D], boxes of R slots
    qkv_keys,  # the same, boxes of C slots
    out,  # descriptor of the output, boxes of R slots; of the matrix [T, H D] if D is the head size
    out_ptr,  # [T, H, D] contiguous, written
    lse2_ptr,  # fp32 [H, T rounded up], written; until the repair NaN where a row's output is
    end_ptr,  # int32 [T]
    key_tiles_ptr,  # int32 [Q, K], or of tall tiles [P, K], TileSchedule
    num_key_tiles_ptr,  # int32 [Q] or [P]
    dropout_key_ptr,  # int64 [], read only with DROPOUT
    # Strides in elements, of the projection's heads and parts, a row of key_tiles and a head's lse2; T; the
    # scale of scores in units of log 2; the smallest word kept, the factor on what is kept, head 0's plane of
    # masks.
    stride_h, stride_3, key_tiles_stride, lse2_stride, tokens, scale2, keep_threshold, keep_scale, first_head,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASK_ALL: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest, then neighbouring tiles: what they share is then still in the cache.
    head, tile, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    _forward_tile(
        qkv_queries, qkv_keys, out, out_ptr, lse2_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr,
        dropout_key_ptr, stride_h, stride_3, key_tiles_stride, lse2_stride, tokens, scale2,
        keep_threshold, keep_scale, first_head, tile, head, heads,
        R, C, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False, MASK_ALL,
    )  # fmt: skip


@triton.jit
def _repair_forward(
    qkv_queries, qkv_keys, out, out_ptr, lse2_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr,
    dropout_key_ptr,
    stride_h, stride_3, key_tiles_stride, lse2_stride, tokens, scale2, keep_threshold, keep_scale, first_head,
    heads,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, FLAT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASK_ALL: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Compute those of SPAN tiles of a head once more that hold a NaN. Arguments as of `_forward`."""
    head = tl.program_id(0)
    first, lse2_T = tl.program_id(1) * SPAN, lse2_ptr + tl.cast(head, tl.int64) * lse2_stride
    # One look at the marks of all SPAN tiles: mostly the program ends with it.
    rows = first * R + tl.arange(0, SPAN * R)
    if _any_nan(lse2_T + rows, rows < tokens):
        for tile in range(first, min(first + SPAN, tl.cdiv(tokens, R))):
            rows_R = tile * R + tl.arange(0, R)
            if _any_nan(lse2_T + rows_R, rows_R < tokens):
                _forward_tile(
                    qkv_queries, qkv_keys, out, out_ptr, lse2_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr,
                    dropout_key_ptr, stride_h, stride_3, key_tiles_stride, lse2_stride, tokens, scale2,
                    keep_threshold, keep_scale, first_head, tile, head, heads,
                    R, C, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, True, MASK_ALL,
                )  # fmt: skip


@triton.jit
def _any_nan(pointers, exists):
    values = tl.load(pointers, mask=exists, other=0.0)
    return tl.max((values != values).to(tl.int32), axis=0) != 0
