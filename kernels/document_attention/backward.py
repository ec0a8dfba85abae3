"""Backward kernel: a tile's dQ, or a tile's dK and dV, a turn.

With P the probabilities, m their dropout factor (0 or 1 / (1 - p)) and O the output:

    delta[i] = sum_d dO[i,d] O[i,d]         dP = m * (dO V^T)          dS = P * (dP - delta)
    dQ = softmax_scale * dS K               dK = softmax_scale * dS^T Q                dV = (m * P)^T dO

P is recomputed from `lse2` of the forward: P = exp2(scale2 * Q K^T - lse2). A turn of queries owns the dQ of
64 slots and visits the key tiles of the schedule; first it writes their delta. A turn of keys owns the dK and
dV of 64 slots and visits the query tiles from its own to the last that sees it, which are neighbours even in
a forest. Each sum has one owner and one order, so a repeat is equal bit for bit; no atomic touches a sum.

Both kinds read the same q, k, v and dO. Two launches would bring them from memory twice, so there is one: the
schedule's order gives a tile of keys its turn soon after the last tile of rows that sees it, while all of it
is in the cache. It waits until those rows' delta is there. Programs wait for lower numbers than their own
only, and those they wait for never wait. That all come to an end then rests on devices starting programs by
number, which CUDA does not promise, but single-pass scans rely on too.

A delta says itself that it is there: before the launch all its bits are ones, a NaN that none is stored as.
So no fence orders it before a flag, which would hold up every turn of queries. Those who wait read past the
first-level cache, and the copy engine, which fetches the delta then, has none: they meet it in the second.
PTX does not promise that without a fence; what came too early would be a NaN, and computed once more.

As in the forward, 0 * NaN is NaN: a gradient tile with a NaN in it is computed once more by
`_repair_backward` with whatever is not finite taken out, and the slots that do see such a value become NaN.

T slots, H heads, R slots of the program's own tile, C of a tile that it visits (KEYS in a turn of queries,
QUERIES in one of keys), D head size in the tile.
"""

import triton
import triton.language as tl

from ..philox_triton import keep_tile
from .tiles import (
    addresses,
    load_gradient,
    load_part,
    nan_rows,
    prefetch_tile,
    sees_any,
    store_tile,
    visible,
    zero_where_not_finite,
)


@triton.jit
def _all_there(pointers, wanted):
    """Whether every delta that is wanted has been written."""
    # volatile: from memory in every call, not from a cache.
    bits = tl.load(pointers, mask=wanted, other=0.0, volatile=True).to(tl.int32, bitcast=True)
    return tl.max((bits == -1).to(tl.int32), axis=0) == 0


@triton.jit
def _await_delta(delta_T, first, stop, LOOK: tl.constexpr):
    """Wait until the rows first ... stop - 1 have their delta."""
    for row in range(first, stop, LOOK):
        rows = row + tl.arange(0, LOOK)
        # The maximum over all threads holds each of them back until all have seen theirs.
        there = _all_there(delta_T + rows, rows < stop)
        while not there:
            there = _all_there(delta_T + rows, rows < stop)


@triton.jit
def _query_tile(
    qkv_own, grad_own, qkv_visited, d_qkv, qkv_ptr, grad_ptr, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr,
    end_ptr, key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr,
    stride_t, stride_h, stride_3, key_tiles_stride, statistics_stride, tokens, scale, scale2, keep_threshold,
    keep_scale, first_head, tile, head, heads,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, FLAT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Write dQ and delta of a tile; return which rows of dQ hold a NaN."""
    first = tile * R
    rows_R = first + tl.arange(0, R)
    if PREFETCH:
        # The loads below wait for one another. All of it is asked for here, and found in the cache there.
        prefetch_tile(qkv_ptr + tl.cast(head, tl.int64) * stride_h, stride_t, first, tokens, R, D)
        prefetch_tile(grad_ptr + head * HEAD_DIM, heads * HEAD_DIM, first, tokens, R, D)
        prefetch_tile(out_ptr + head * HEAD_DIM, heads * HEAD_DIM, first, tokens, R, D)
    pointers_RD, exists_RD = addresses(
        out_ptr + head * HEAD_DIM, heads * HEAD_DIM, first, tokens, R, D, HEAD_DIM
    )
    out_RD = tl.load(pointers_RD, mask=exists_RD, other=0.0)
    statistics_R = tl.cast(head, tl.int64) * statistics_stride + rows_R
    lse2_R = tl.load(lse2_ptr + statistics_R)
    num_key_tiles = tl.load(num_key_tiles_ptr + tile)
    key_tiles_ptr += tl.cast(tile, tl.int64) * key_tiles_stride
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    q_RD = load_part(qkv_own, stride_h, stride_3, first, head, 0, R, D, FLAT)
    grad_RD = load_gradient(grad_own, first, head, R, D, HEAD_DIM)
    delta_R = tl.sum(out_RD.to(tl.float32) * grad_RD.to(tl.float32), axis=1)
    # Another NaN than the one that stands for nothing yet.
    delta_R = tl.where(delta_R == delta_R, delta_R, float("nan"))
    tl.store(delta_ptr + statistics_R, delta_R)

    dq_RD = tl.zeros([R, D], tl.float32)
    spoilt_R = tl.zeros([R], tl.int32)
    for index in range(num_key_tiles):
        entry = tl.load(key_tiles_ptr + index)
        first_column = (entry >> 1) * C
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
    column, row = 3 * head * HEAD_DIM, 3 * heads * HEAD_DIM
    store_tile(d_qkv, d_qkv_ptr, row, first, column, tokens, dq_RD * scale, HEAD_DIM)
    return nan_rows(dq_RD)


@triton.jit
def _key_tile(
    qkv_own, qkv_visited, grad_visited, lse2_visited, delta_visited, d_qkv, d_qkv_ptr, delta_ptr, end_ptr,
    stop_ptr, common_stop_ptr, dropout_key_ptr,
    stride_h, stride_3, statistics_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    tile, head, heads,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, FLAT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of a tile; return which rows hold a NaN. Scores are transposed: keys by queries."""
    first = tile * R
    keys_R = first + tl.arange(0, R)
    stop, common_stop = tl.load(stop_ptr + tile), tl.load(common_stop_ptr + tile)
    end_R = tl.load(end_ptr + keys_R, mask=keys_R < tokens, other=0)
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    # Inputs, ready from the start: asked for before the wait, not after.
    k_RD = load_part(qkv_own, stride_h, stride_3, first, head, 1, R, D, FLAT)
    v_RD = load_part(qkv_own, stride_h, stride_3, first, head, 2, R, D, FLAT)

    dk_RD = tl.zeros([R, D], tl.float32)
    dv_RD = tl.zeros([R, D], tl.float32)
    spoilt_k_R = tl.zeros([R], tl.int32)
    spoilt_v_R = tl.zeros([R], tl.int32)
    if not REPAIR:
        delta_T_ptr = delta_ptr + tl.cast(head, tl.int64) * statistics_stride
        _await_delta(delta_T_ptr, first, stop, LOOK=256)
    # Rows that see a column are neighbours, so no list is needed; `stop` is the last one's successor.
    for first_query in range(first, stop, C):
        queries_C = first_query + tl.arange(0, C)
        q_CD = load_part(qkv_visited, stride_h, stride_3, first_query, head, 0, C, D, FLAT)
        grad_CD = load_gradient(grad_visited, first_query, head, C, D, HEAD_DIM)
        lse2_C = lse2_visited.load([head * statistics_stride + first_query])
        delta_C = delta_visited.load([head * statistics_stride + first_query])
        scores_RC = tl.dot(k_RD, tl.trans(q_CD), input_precision=PRECISION)
        dp_RC = tl.dot(v_RD, tl.trans(grad_CD), input_precision=PRECISION)
        p_RC = tl.exp2(scores_RC * scale2 - lse2_C[None, :])
        dropped_RC = p_RC
        if DROPOUT:
            # Drawn as rows by columns, where four neighbours share a call, and turned.
            keep_CR = keep_tile(dropout_key, keep_threshold, queries_C, first, first_head + head, R)
            keep_RC = tl.trans(keep_CR.to(tl.int8)) != 0
            dropped_RC = tl.where(keep_RC, p_RC * keep_scale, 0.0)
            dp_RC = tl.where(keep_RC, dp_RC * keep_scale, 0.0)
        ds_RC = p_RC * (dp_RC - delta_C[None, :])
        # Every key sees these queries unless some end before the last of them, or the diagonal cuts the tile.
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
    column, row = 3 * head * HEAD_DIM, 3 * heads * HEAD_DIM
    store_tile(d_qkv, d_qkv_ptr, row, first, column + HEAD_DIM, tokens, dk_RD * scale, HEAD_DIM)
    store_tile(d_qkv, d_qkv_ptr, row, first, column + 2 * HEAD_DIM, tokens, dv_RD, HEAD_DIM)
    return nan_rows(dk_RD) | nan_rows(dv_RD)


@triton.jit
def _backward(
    qkv_own,  # descriptor of the projection [T, H, 3, D], boxes of R slots
    grad_own,  # descriptor of the output's gradient [T, H, D] contiguous, boxes of R slots
    qkv_keys, qkv_queries, grad_queries,  # the same in boxes of KEYS, QUERIES and QUERIES slots
    lse2_queries, delta_queries,  # descriptors of lse2 and delta as vectors, boxes of QUERIES slots
    d_qkv,  # descriptor of the gradient, boxes of R slots; of the matrix [T, row] if D is the head size
    qkv_ptr, grad_ptr,  # what the descriptors describe
    out_ptr,  # [T, H, D] contiguous
    d_qkv_ptr,  # [T, H, 3, D] contiguous, written
    lse2_ptr,  # fp32 [H, Q R]
    delta_ptr,  # fp32 [H, Q R], written; all bits are 1 at the start
    nan_ptr,  # int32 [2, Q, H], -1 at the start; 1: the tile of dQ, of dK or dV, holds a NaN
    end_ptr,  # int32 [T]
    key_tiles_ptr,  # int32 [Q, K], TileSchedule
    num_key_tiles_ptr, stop_ptr, common_stop_ptr,  # int32 [Q], TileSchedule
    order_ptr,  # int32 [2 Q], TileSchedule
    dropout_key_ptr,  # int64 []
    # As in `_forward`, and the strides of qkv's slots and of a head's lse2 and delta; scale is softmax_scale,
    # scale2 the same in units of log 2.
    stride_t, stride_h, stride_3, key_tiles_stride, statistics_stride, tokens, scale, scale2, keep_threshold,
    keep_scale, first_head, query_tiles, heads,
    R: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    # A program's number is its place in the order, so whoever a tile of keys waits for has a lower one. Heads
    # vary fastest: the heads of a slot lie side by side in memory.
    head, turn = tl.program_id(0) % heads, tl.load(order_ptr + tl.program_id(0) // heads)
    # R pointers to one flag: whichever rows hold a NaN write the same 1, without a reduction.
    nan_R = nan_ptr + turn * heads + head + tl.zeros([R], tl.int32)
    if turn < query_tiles:
        has_nan_R = _query_tile(
            qkv_own, grad_own, qkv_keys, d_qkv, qkv_ptr, grad_ptr, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr,
            end_ptr, key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr, stride_t, stride_h, stride_3,
            key_tiles_stride, statistics_stride, tokens, scale, scale2, keep_threshold, keep_scale,
            first_head, turn, head, heads, R, KEYS, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, PREFETCH, False,
        )  # fmt: skip
        tl.store(nan_R, 1, mask=has_nan_R)
    else:
        has_nan_R = _key_tile(
            qkv_own, qkv_queries, grad_queries, lse2_queries, delta_queries, d_qkv, d_qkv_ptr, delta_ptr,
            end_ptr, stop_ptr, common_stop_ptr, dropout_key_ptr, stride_h, stride_3, statistics_stride,
            tokens, scale, scale2, keep_threshold, keep_scale, first_head, turn - query_tiles, head, heads,
            R, QUERIES, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False,
        )  # fmt: skip
        tl.store(nan_R, 1, mask=has_nan_R)


@triton.jit
def _repair_backward(
    qkv_own, grad_own, qkv_keys, qkv_queries, grad_queries, lse2_queries, delta_queries, d_qkv, qkv_ptr,
    grad_ptr, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, nan_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr,
    stop_ptr, common_stop_ptr, order_ptr, dropout_key_ptr,
    stride_t, stride_h, stride_3, key_tiles_stride, statistics_stride, tokens, scale, scale2, keep_threshold,
    keep_scale, first_head, query_tiles, heads,
    R: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Compute those of SPAN tiles that hold a NaN once more: dQ first, then dK and dV. Arguments as of
    `_backward`."""
    # Tiles of queries are the first half of the flags, tiles of keys the second, heads fastest in both.
    first = tl.program_id(0) * SPAN
    indices = first + tl.arange(0, SPAN)
    if tl.max(tl.load(nan_ptr + indices, mask=indices < 2 * query_tiles * heads, other=-1), axis=0) > 0:
        for index in range(first, min(first + SPAN, 2 * query_tiles * heads)):
            if tl.load(nan_ptr + index) > 0:
                tile, head = index // heads % query_tiles, index % heads
                if index < query_tiles * heads:
                    _query_tile(
                        qkv_own, grad_own, qkv_keys, d_qkv, qkv_ptr, grad_ptr, out_ptr, d_qkv_ptr, lse2_ptr,
                        delta_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr, stride_t,
                        stride_h, stride_3, key_tiles_stride, statistics_stride, tokens, scale, scale2,
                        keep_threshold, keep_scale, first_head, tile, head, heads,
                        R, KEYS, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False, True,
                    )  # fmt: skip
                else:
                    _key_tile(
                        qkv_own, qkv_queries, grad_queries, lse2_queries, delta_queries, d_qkv, d_qkv_ptr,
                        delta_ptr, end_ptr, stop_ptr, common_stop_ptr, dropout_key_ptr, stride_h, stride_3,
                        statistics_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
                        tile, head, heads,
                        R, QUERIES, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, True,
                    )  # fmt: skip
