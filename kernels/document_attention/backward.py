"""Backward kernels: `_query_gradient` for dQ, then `_key_gradients` for dK and dV.

With P the probabilities, m their dropout factor (0 or 1 / (1 - p)) and O the output:

    delta[i] = sum_d dO[i,d] O[i,d]         dP = m * (dO V^T)          dS = P * (dP - delta)
    dQ = softmax_scale * dS K               dK = softmax_scale * dS^T Q                dV = (m * P)^T dO

P is recomputed from `lse2` of the forward: P = exp2(scale2 * Q K^T - lse2). One program owns the dQ of 64
slots and visits the key tiles of the schedule; on the way it writes their delta, for which a kernel of its
own would read dO and O once more. Another program owns the dK and dV of 64 slots and visits the query tiles
from its own to the last that sees it, which are neighbours even in a forest. Each sum has one owner and one
order, so a repeat is equal bit for bit, without atomics.

As in the forward, 0 * NaN is NaN: a gradient tile with a NaN in it is computed once more by
`_repair_backward` with whatever is not finite taken out, and the slots that do see such a value become NaN.

T slots, H heads, R slots of the program's own tile, K of the schedule's key tiles, C of a tile that it
visits, D head size in the tile.
"""

import triton
import triton.language as tl

from ..philox_triton import keep_tile
from .tiles import (
    addresses,
    holds_nan,
    load_gradient,
    load_part,
    sees_any,
    store_tile,
    visible,
    zero_where_not_finite,
)


@triton.jit
def _query_tile(
    qkv_own, grad_own, qkv_visited, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, end_ptr, key_tiles_ptr,
    num_key_tiles_ptr, dropout_key_ptr,
    stride_h, stride_3, key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    tile, head, heads,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Write dQ and delta of a tile; return whether dQ holds a NaN."""
    first = tile * R
    rows_R = first + tl.arange(0, R)
    statistics = tl.cast(head, tl.int64) * tokens + rows_R
    # Asked for first: it needs no shared memory, so it is on its way while the others are waited for.
    pointers_RD, exists_RD = addresses(
        out_ptr + head * HEAD_DIM, heads * HEAD_DIM, first, tokens, R, D, HEAD_DIM
    )
    out_RD = tl.load(pointers_RD, mask=exists_RD, other=0.0)
    lse2_R = tl.load(lse2_ptr + statistics, mask=rows_R < tokens, other=0.0)
    num_key_tiles = tl.load(num_key_tiles_ptr + tile)
    key_tiles_ptr += tl.cast(tile, tl.int64) * key_tiles_stride
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    q_RD = load_part(qkv_own, stride_h, stride_3, first, head, 0, R, D, FLAT)
    grad_RD = load_gradient(grad_own, first, head, R, D, HEAD_DIM)
    delta_R = tl.sum(out_RD.to(tl.float32) * grad_RD.to(tl.float32), axis=1)
    tl.store(delta_ptr + statistics, delta_R, mask=rows_R < tokens)

    dq_RD = tl.zeros([R, D], tl.float32)
    spoilt_R = tl.zeros([R], tl.int32)
    for index in range(num_key_tiles * (K // C)):
        entry = tl.load(key_tiles_ptr + index // (K // C))
        first_column = (entry >> 1) * K + index % (K // C) * C
        columns_C = first_column + tl.arange(0, C)
        k_CD = load_part(qkv_visited, stride_h, stride_3, first_column, head, 1, C, D, FLAT)
        v_CD = load_part(qkv_visited, stride_h, stride_3, first_column, head, 2, C, D, FLAT)
        scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION)
        dp_RC = tl.dot(grad_RD, tl.trans(v_CD), input_precision=PRECISION)
        if DROPOUT:
            keep_RC = keep_tile(dropout_key, keep_threshold, rows_R, first_column, first_head + head, C)
            dp_RC = tl.where(keep_RC, dp_RC * keep_scale, 0.0)
        ds_RC = tl.exp2(scores_RC * scale2 - lse2_R[:, None]) * (dp_RC - delta_R[:, None])
        if entry & 1:
            # Not only P is masked: it may be 0 * NaN.
            ds_RC = tl.where(visible(rows_R, columns_C, end_ptr, tokens), ds_RC, 0.0)
        if REPAIR:
            k_CD, spoilt_C = zero_where_not_finite(k_CD)
            spoilt_R = sees_any(visible(rows_R, columns_C, end_ptr, tokens), spoilt_C, spoilt_R)
        dq_RD = tl.dot(ds_RC.to(k_CD.dtype), k_CD, dq_RD, input_precision=PRECISION)
    if REPAIR:
        dq_RD = tl.where(spoilt_R[:, None] != 0, float("nan"), dq_RD)
    store_tile(
        d_qkv_ptr + head * (3 * HEAD_DIM), heads * (3 * HEAD_DIM), first, tokens, dq_RD * scale, HEAD_DIM
    )
    return holds_nan(dq_RD)


@triton.jit
def _key_tile(
    qkv_own, qkv_visited, grad_visited, d_qkv_ptr, lse2_ptr, delta_ptr, end_ptr, stop_ptr, common_stop_ptr,
    dropout_key_ptr,
    stride_h, stride_3, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    tile, head, heads,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, FLAT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of a tile; return whether they hold a NaN. Scores are transposed: keys by queries."""
    first = tile * R
    keys_R = first + tl.arange(0, R)
    stop, common_stop = tl.load(stop_ptr + tile), tl.load(common_stop_ptr + tile)
    end_R = tl.load(end_ptr + keys_R, mask=keys_R < tokens, other=0)
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    statistics = tl.cast(head, tl.int64) * tokens
    k_RD = load_part(qkv_own, stride_h, stride_3, first, head, 1, R, D, FLAT)
    v_RD = load_part(qkv_own, stride_h, stride_3, first, head, 2, R, D, FLAT)

    dk_RD = tl.zeros([R, D], tl.float32)
    dv_RD = tl.zeros([R, D], tl.float32)
    spoilt_k_R = tl.zeros([R], tl.int32)
    spoilt_v_R = tl.zeros([R], tl.int32)
    for first_query in range(first, stop, C):
        queries_C = first_query + tl.arange(0, C)
        q_CD = load_part(qkv_visited, stride_h, stride_3, first_query, head, 0, C, D, FLAT)
        grad_CD = load_gradient(grad_visited, first_query, head, C, D, HEAD_DIM)
        lse2_C = tl.load(lse2_ptr + statistics + queries_C, mask=queries_C < tokens, other=0.0)
        delta_C = tl.load(delta_ptr + statistics + queries_C, mask=queries_C < tokens, other=0.0)
        scores_RC = tl.dot(k_RD, tl.trans(q_CD), input_precision=PRECISION)
        dp_RC = tl.dot(v_RD, tl.trans(grad_CD), input_precision=PRECISION)
        p_RC = tl.exp2(scores_RC * scale2 - lse2_C[None, :])
        dropped_RC = p_RC
        if DROPOUT:
            keep_CR = keep_tile(dropout_key, keep_threshold, queries_C, first, first_head + head, R)
            keep_RC = tl.trans(keep_CR.to(tl.int8)) != 0
            dropped_RC = tl.where(keep_RC, p_RC * keep_scale, 0.0)
            dp_RC = tl.where(keep_RC, dp_RC * keep_scale, 0.0)
        ds_RC = p_RC * (dp_RC - delta_C[None, :])
        if (first_query + C > common_stop) | (first_query < first + R):
            sees_RC = (keys_R[:, None] <= queries_C[None, :]) & (queries_C[None, :] < end_R[:, None])
            dropped_RC = tl.where(sees_RC, dropped_RC, 0.0)
            ds_RC = tl.where(sees_RC, ds_RC, 0.0)
        if REPAIR:
            sees_RC = (keys_R[:, None] <= queries_C[None, :]) & (queries_C[None, :] < end_R[:, None])
            q_CD, spoilt_q_C = zero_where_not_finite(q_CD)
            grad_CD, spoilt_grad_C = zero_where_not_finite(grad_CD)
            spoilt_k_R = sees_any(sees_RC, spoilt_q_C, spoilt_k_R)
            spoilt_v_R = sees_any(sees_RC, spoilt_grad_C, spoilt_v_R)
        dv_RD = tl.dot(dropped_RC.to(k_RD.dtype), grad_CD, dv_RD, input_precision=PRECISION)
        dk_RD = tl.dot(ds_RC.to(k_RD.dtype), q_CD, dk_RD, input_precision=PRECISION)
    if REPAIR:
        dk_RD = tl.where(spoilt_k_R[:, None] != 0, float("nan"), dk_RD)
        dv_RD = tl.where(spoilt_v_R[:, None] != 0, float("nan"), dv_RD)
    d_k_ptr, d_stride = d_qkv_ptr + head * (3 * HEAD_DIM) + HEAD_DIM, heads * (3 * HEAD_DIM)
    store_tile(d_k_ptr, d_stride, first, tokens, dk_RD * scale, HEAD_DIM)
    store_tile(d_k_ptr + HEAD_DIM, d_stride, first, tokens, dv_RD, HEAD_DIM)
    return holds_nan(dk_RD) | holds_nan(dv_RD)


@triton.jit
def _query_gradient(
    qkv_own,  # descriptor of the projection [T, H, 3, D], boxes of R slots
    grad_own,  # descriptor of the output's gradient [T, H, D] contiguous, boxes of R slots
    qkv_visited,  # as qkv_own, boxes of C slots
    out_ptr,  # [T, H, D] contiguous
    d_qkv_ptr,  # [T, H, 3, D] contiguous
    lse2_ptr,  # fp32 [H, T]
    delta_ptr,  # fp32 [H, T], written
    nan_ptr,  # int32 [2, Q, H]: does the tile of dQ, of dK or dV, hold a NaN
    end_ptr,  # int32 [T]
    key_tiles_ptr,  # int32 [Q, K], TileSchedule
    num_key_tiles_ptr,  # int32 [Q]
    dropout_key_ptr,  # int64 []
    stride_h, stride_3, key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    has_nan = _query_tile(
        qkv_own, grad_own, qkv_visited, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, end_ptr, key_tiles_ptr,
        num_key_tiles_ptr, dropout_key_ptr, stride_h, stride_3, key_tiles_stride, tokens, scale, scale2,
        keep_threshold, keep_scale, first_head, tile, head, heads,
        R, K, C, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False,
    )  # fmt: skip
    tl.store(nan_ptr + tile * heads + head, has_nan.to(tl.int32))


@triton.jit
def _key_gradients(
    qkv_own, qkv_visited, grad_visited, d_qkv_ptr, lse2_ptr, delta_ptr, nan_ptr, end_ptr,
    stop_ptr, common_stop_ptr,  # int32 [Q], TileSchedule
    dropout_key_ptr,
    stride_h, stride_3, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, FLAT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    has_nan = _key_tile(
        qkv_own, qkv_visited, grad_visited, d_qkv_ptr, lse2_ptr, delta_ptr, end_ptr, stop_ptr,
        common_stop_ptr, dropout_key_ptr, stride_h, stride_3, tokens, scale, scale2, keep_threshold,
        keep_scale, first_head, tile, head, heads, R, C, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False,
    )  # fmt: skip
    tl.store(nan_ptr + (tl.num_programs(1) + tile) * heads + head, has_nan.to(tl.int32))


@triton.jit
def _repair_backward(
    qkv_own, grad_own, qkv_queries, qkv_keys, grad_queries, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, nan_ptr,
    end_ptr, key_tiles_ptr, num_key_tiles_ptr, stop_ptr, common_stop_ptr, dropout_key_ptr,
    stride_h, stride_3, key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    num_tiles, heads,
    R: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Compute those of SPAN tiles that hold a NaN once more: of dQ in the first half of the programs."""
    first = tl.program_id(0) * SPAN
    indices = first + tl.arange(0, SPAN)
    if tl.max(tl.load(nan_ptr + indices, mask=indices < 2 * num_tiles, other=0), axis=0) != 0:
        for index in range(first, min(first + SPAN, 2 * num_tiles)):
            if tl.load(nan_ptr + index) != 0:
                tile, head = index % num_tiles // heads, index % heads
                if index < num_tiles:
                    _query_tile(
                        qkv_own, grad_own, qkv_keys, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, end_ptr,
                        key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr, stride_h, stride_3,
                        key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
                        tile, head, heads, R, K, KEYS, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, True,
                    )  # fmt: skip
                else:
                    _key_tile(
                        qkv_own, qkv_queries, grad_queries, d_qkv_ptr, lse2_ptr, delta_ptr, end_ptr, stop_ptr,
                        common_stop_ptr, dropout_key_ptr, stride_h, stride_3, tokens, scale, scale2,
                        keep_threshold, keep_scale, first_head, tile, head, heads,
                        R, QUERIES, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, True,
                    )  # fmt: skip
