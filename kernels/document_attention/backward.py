"""Backward kernel: a tile's dQ, or a tile's dK and dV, a turn.

With P the probabilities, m their dropout factor (0 or 1 / (1 - p)) and O the output:

    delta[i] = sum_d dO[i,d] O[i,d]         dP = m * (dO V^T)          dS = P * (dP - delta)
    dQ = softmax_scale * dS K               dK = softmax_scale * dS^T Q                dV = (m * P)^T dO

P is recomputed from `lse2` of the forward: P = exp2(scale2 * Q K^T - lse2). A turn of queries owns the dQ of
64 slots and visits the key tiles of the schedule; first it writes their delta. A turn of keys owns the dK and
dV of 64 slots and visits the query tiles from its own to the last that sees it, which are neighbours even in
a forest. Each sum has one owner and one order, so a repeat is equal bit for bit; no atomic touches a sum.

Both kinds read the same q, k, v and dO. Two launches would bring them from memory twice, so there is one: the
schedule's order gives a tile of keys its turn right after the last tile of rows that sees it, while all of it
is in the cache. It waits until those rows' delta is there. Programs wait for lower numbers than their own
only, and those they wait for never wait. That all come to an end then rests on devices starting programs by
number, which CUDA does not promise, but single-pass scans rely on too.

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
    sees_any,
    store_tile,
    visible,
    zero_where_not_finite,
)


@triton.jit
def _all_done(pointers, wanted):
    """Whether every flag that is wanted is 1. Adding 0 is a read that no cache answers and no later read
    overtakes."""
    done = tl.atomic_add(pointers, tl.zeros_like(wanted.to(tl.int32)), mask=wanted, sem="acquire")
    return tl.min(tl.where(wanted, done, 1), axis=0)


@triton.jit
def _await_rows(progress_ptr, first_tile, stop_tile, head, heads, LOOK: tl.constexpr):
    """Wait until the tiles first_tile ... stop_tile - 1 have their delta."""
    # LOOK flags at a time: a document of 2,048 slots has 32 tiles.
    for first in range(first_tile, stop_tile, LOOK):
        tiles = first + tl.arange(0, LOOK)
        pointers, wanted = progress_ptr + tiles * heads + head, tiles < stop_tile
        done = _all_done(pointers, wanted)
        while done == 0:
            done = _all_done(pointers, wanted)
    # A thread acquires for the flags that it read itself: none may load delta before all have seen theirs.
    tl.debug_barrier()


@triton.jit
def _query_tile(
    qkv_own, grad_own, qkv_visited, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, progress_ptr, end_ptr,
    key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr,
    stride_h, stride_3, key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    tile, head, heads,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Write dQ and delta of a tile; return which rows of dQ hold a NaN."""
    first = tile * R
    rows_R = first + tl.arange(0, R)
    statistics = tl.cast(head, tl.int64) * tokens + rows_R  # [R], of lse2 and delta
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
    # Before the loop: told inside, behind its first loads, it stops the pipelining (README: 0.711).
    tl.store(delta_ptr + statistics, delta_R, mask=rows_R < tokens)
    if not REPAIR:
        # All of the program's threads have stored before one of them says so.
        tl.debug_barrier()
        tl.atomic_xchg(progress_ptr + tile * heads + head, 1, sem="release")

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
    store_tile(
        d_qkv_ptr + head * (3 * HEAD_DIM), heads * (3 * HEAD_DIM), first, tokens, dq_RD * scale, HEAD_DIM
    )
    return nan_rows(dq_RD)


@triton.jit
def _key_tile(
    qkv_own, qkv_visited, grad_visited, d_qkv_ptr, lse2_ptr, delta_ptr, progress_ptr, end_ptr, stop_ptr,
    common_stop_ptr, dropout_key_ptr,
    stride_h, stride_3, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
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
    statistics = tl.cast(head, tl.int64) * tokens
    # Inputs, ready from the start: asked for before the wait, not after.
    k_RD = load_part(qkv_own, stride_h, stride_3, first, head, 1, R, D, FLAT)
    v_RD = load_part(qkv_own, stride_h, stride_3, first, head, 2, R, D, FLAT)

    dk_RD = tl.zeros([R, D], tl.float32)
    dv_RD = tl.zeros([R, D], tl.float32)
    spoilt_k_R = tl.zeros([R], tl.int32)
    spoilt_v_R = tl.zeros([R], tl.int32)
    if not REPAIR:
        _await_rows(progress_ptr, tile, tl.cdiv(stop, R), head, heads, 32)
    # Rows that see a column are neighbours, so no list is needed; `stop` is the last one's successor.
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
    d_k_ptr, d_stride = d_qkv_ptr + head * (3 * HEAD_DIM) + HEAD_DIM, heads * (3 * HEAD_DIM)
    store_tile(d_k_ptr, d_stride, first, tokens, dk_RD * scale, HEAD_DIM)
    store_tile(d_k_ptr + HEAD_DIM, d_stride, first, tokens, dv_RD, HEAD_DIM)
    return nan_rows(dk_RD) | nan_rows(dv_RD)


@triton.jit
def _backward(
    qkv_own,  # descriptor of the projection [T, H, 3, D], boxes of R slots
    grad_own,  # descriptor of the output's gradient [T, H, D] contiguous, boxes of R slots
    qkv_keys, qkv_queries, grad_queries,  # the same in boxes of KEYS, QUERIES and QUERIES slots
    out_ptr,  # [T, H, D] contiguous
    d_qkv_ptr,  # [T, H, 3, D] contiguous, written
    lse2_ptr,  # fp32 [H, T]
    delta_ptr,  # fp32 [H, T], written
    nan_ptr,  # int32 [2, Q, H], 0 at the start: does the tile of dQ, of dK or dV, hold a NaN
    progress_ptr,  # int32 [Q, H], 0 at the start: do the rows of the tile have their delta
    end_ptr,  # int32 [T]
    key_tiles_ptr,  # int32 [Q, K], TileSchedule
    num_key_tiles_ptr, stop_ptr, common_stop_ptr,  # int32 [Q], TileSchedule
    order_ptr,  # int32 [2 Q], TileSchedule
    dropout_key_ptr,  # int64 []
    # As in `_forward`; scale is softmax_scale, scale2 the same in units of log 2.
    stride_h, stride_3, key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    query_tiles, heads,
    R: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program's number is its place in the order, so whoever a tile of keys waits for has a lower one. Heads
    # vary fastest: the heads of a slot lie side by side in memory.
    head, turn = tl.program_id(0) % heads, tl.load(order_ptr + tl.program_id(0) // heads)
    # R pointers to one flag: whichever rows hold a NaN write the same 1, without a reduction.
    nan_R = nan_ptr + turn * heads + head + tl.zeros([R], tl.int32)
    if turn < query_tiles:
        has_nan_R = _query_tile(
            qkv_own, grad_own, qkv_keys, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, progress_ptr, end_ptr,
            key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr, stride_h, stride_3, key_tiles_stride, tokens,
            scale, scale2, keep_threshold, keep_scale, first_head, turn, head, heads,
            R, KEYS, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False,
        )  # fmt: skip
        tl.store(nan_R, 1, mask=has_nan_R)
    else:
        has_nan_R = _key_tile(
            qkv_own, qkv_queries, grad_queries, d_qkv_ptr, lse2_ptr, delta_ptr, progress_ptr, end_ptr,
            stop_ptr, common_stop_ptr, dropout_key_ptr, stride_h, stride_3, tokens, scale, scale2,
            keep_threshold, keep_scale, first_head, turn - query_tiles, head, heads,
            R, QUERIES, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, False,
        )  # fmt: skip
        tl.store(nan_R, 1, mask=has_nan_R)


@triton.jit
def _repair_backward(
    qkv_own, grad_own, qkv_keys, qkv_queries, grad_queries, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, nan_ptr,
    progress_ptr, end_ptr, key_tiles_ptr, num_key_tiles_ptr, stop_ptr, common_stop_ptr, order_ptr,
    dropout_key_ptr,
    stride_h, stride_3, key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
    query_tiles, heads,
    R: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, FLAT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Compute those of SPAN tiles that hold a NaN once more: dQ first, then dK and dV. Arguments as of
    `_backward`."""
    # Tiles of queries are the first half of the flags, tiles of keys the second, heads fastest in both.
    first = tl.program_id(0) * SPAN
    indices = first + tl.arange(0, SPAN)
    if tl.max(tl.load(nan_ptr + indices, mask=indices < 2 * query_tiles * heads, other=0), axis=0) != 0:
        for index in range(first, min(first + SPAN, 2 * query_tiles * heads)):
            if tl.load(nan_ptr + index) != 0:
                tile, head = index // heads % query_tiles, index % heads
                if index < query_tiles * heads:
                    _query_tile(
                        qkv_own, grad_own, qkv_keys, out_ptr, d_qkv_ptr, lse2_ptr, delta_ptr, progress_ptr,
                        end_ptr, key_tiles_ptr, num_key_tiles_ptr, dropout_key_ptr, stride_h, stride_3,
                        key_tiles_stride, tokens, scale, scale2, keep_threshold, keep_scale, first_head,
                        tile, head, heads, R, KEYS, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, True,
                    )  # fmt: skip
                else:
                    _key_tile(
                        qkv_own, qkv_queries, grad_queries, d_qkv_ptr, lse2_ptr, delta_ptr, progress_ptr,
                        end_ptr, stop_ptr, common_stop_ptr, dropout_key_ptr, stride_h, stride_3, tokens,
                        scale, scale2, keep_threshold, keep_scale, first_head, tile, head, heads,
                        R, QUERIES, D, HEAD_DIM, FLAT, DROPOUT, PRECISION, True,
                    )  # fmt: skip
