"""Backward kernels: `_delta`, one pass over the output, then `_backward`, one program per tile of slots.

With P the probabilities, m their dropout factor (0 or 1 / (1 - p)) and O the output:

    delta[i] = sum_d dO[i,d] O[i,d]         dP = m * (dO V^T)          dS = P * (dP - delta)
    dQ = softmax_scale * dS K               dK = softmax_scale * dS^T Q                dV = (m * P)^T dO

P is recomputed from `lse2` of the forward: P = exp2(scale2 * Q K^T - lse2). A program owns 64 slots and
writes their dQ, dK and dV: as queries it visits the key tiles left of its diagonal, as keys the query tiles
below it, and the tile on the diagonal, half of all work where documents are short, serves all three at once.
Each sum has one owner and one order, so a repeat is equal bit for bit, without atomics.

As in the forward, 0 * NaN is NaN: a gradient tile with a NaN in it is computed once more with whatever is not
finite taken out, and the slots that do see such a value become NaN.

R slots of the program's own tile, C of a tile that it visits, D head size in the tile (a power of two).
"""

import triton
import triton.language as tl

from ..philox_triton import keep_tile
from .tiles import holds_nan, load_tile, store_tile, zero_where_not_finite


@triton.jit
def _delta(
    out_ptr, grad_ptr, delta_ptr, grad_stride_t, grad_stride_h, tokens,
    R: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """delta, fp32 [H, T], from out and its gradient [T, H, D]."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = tl.program_id(1) * R
    out_RD = load_tile(out_ptr + head * HEAD_DIM, heads * HEAD_DIM, first, tokens, R, D, HEAD_DIM)
    grad_RD = load_tile(grad_ptr + head * grad_stride_h, grad_stride_t, first, tokens, R, D, HEAD_DIM)
    delta_R = tl.sum(out_RD.to(tl.float32) * grad_RD.to(tl.float32), axis=1)
    rows_R = first + tl.arange(0, R)
    tl.store(delta_ptr + head * tokens + rows_R, delta_R, mask=rows_R < tokens)


@triton.jit
def _query_gradient(
    q_RD, grad_RD, lse2_R, delta_R, k_ptr, v_ptr, stride_t, end_ptr, key_tiles_ptr, num_key_tiles, first_row,
    tokens, scale2, dropout_key, keep_threshold, keep_scale, head,
    C: tl.constexpr, HEAD_DIM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SANITISE: tl.constexpr,
):  # fmt: skip
    """dQ / softmax_scale of the own rows from the first `num_key_tiles` key tiles, fp32 [R, D]."""
    R: tl.constexpr = q_RD.shape[0]
    D: tl.constexpr = q_RD.shape[1]
    rows_R = first_row + tl.arange(0, R)
    dq_RD = tl.zeros([R, D], tl.float32)
    spoilt_R = tl.zeros([R], tl.int32)
    for index in range(num_key_tiles):
        entry = tl.load(key_tiles_ptr + index)
        first_column = (entry >> 1) * C
        k_CD = load_tile(k_ptr, stride_t, first_column, tokens, C, D, HEAD_DIM)
        v_CD = load_tile(v_ptr, stride_t, first_column, tokens, C, D, HEAD_DIM)
        scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION)
        dp_RC = tl.dot(grad_RD, tl.trans(v_CD), input_precision=PRECISION)
        if DROPOUT:
            keep_RC = keep_tile(dropout_key, keep_threshold, rows_R, first_column, head, C)
            dp_RC = tl.where(keep_RC, dp_RC * keep_scale, 0.0)
        ds_RC = tl.exp2(scores_RC * scale2 - lse2_R[:, None]) * (dp_RC - delta_R[:, None])
        if (entry & 1) | SANITISE:
            columns_C = first_column + tl.arange(0, C)
            end_C = tl.load(end_ptr + columns_C, mask=columns_C < tokens, other=0)
            sees_RC = (columns_C[None, :] <= rows_R[:, None]) & (rows_R[:, None] < end_C[None, :])
            ds_RC = tl.where(sees_RC, ds_RC, 0.0)
            if SANITISE:
                k_CD, spoilt_C = zero_where_not_finite(k_CD)
                spoilt_R = tl.maximum(spoilt_R, tl.max((sees_RC & spoilt_C[None, :]).to(tl.int32), axis=1))
        dq_RD = tl.dot(ds_RC.to(k_CD.dtype), k_CD, dq_RD, input_precision=PRECISION)
    if SANITISE:
        dq_RD = tl.where(spoilt_R[:, None] != 0, float("nan"), dq_RD)
    return dq_RD


@triton.jit
def _transposed_scores(
    k_RD, v_RD, q_CD, grad_CD, lse2_C, delta_C, end_R, first_key, first_query, common_stop,
    scale2, dropout_key, keep_threshold, keep_scale, head,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of own keys [R] and visiting queries [C], both [R, C]: dropped probabilities m * P and dS,
    transposed."""
    R: tl.constexpr = k_RD.shape[0]
    C: tl.constexpr = q_CD.shape[0]
    queries_C = first_query + tl.arange(0, C)
    scores_RC = tl.dot(k_RD, tl.trans(q_CD), input_precision=PRECISION)
    dp_RC = tl.dot(v_RD, tl.trans(grad_CD), input_precision=PRECISION)
    p_RC = tl.exp2(scores_RC * scale2 - lse2_C[None, :])
    dropped_RC = p_RC
    if DROPOUT:
        keep_CR = keep_tile(dropout_key, keep_threshold, queries_C, first_key, head, R)
        keep_RC = tl.trans(keep_CR.to(tl.int8)) != 0
        dropped_RC = tl.where(keep_RC, p_RC * keep_scale, 0.0)
        dp_RC = tl.where(keep_RC, dp_RC * keep_scale, 0.0)
    ds_RC = p_RC * (dp_RC - delta_C[None, :])
    if (first_query + C > common_stop) | (first_query < first_key + R):
        keys_R = first_key + tl.arange(0, R)
        sees_RC = (keys_R[:, None] <= queries_C[None, :]) & (queries_C[None, :] < end_R[:, None])
        dropped_RC = tl.where(sees_RC, dropped_RC, 0.0)
        ds_RC = tl.where(sees_RC, ds_RC, 0.0)
    return dropped_RC.to(k_RD.dtype), ds_RC.to(k_RD.dtype)


@triton.jit
def _key_value_gradients(
    dk_RD, dv_RD, k_RD, v_RD, q_ptr, stride_t, grad_ptr, grad_stride_t, lse2_ptr, delta_ptr, end_R, first_key,
    first_query, stop_query, common_stop, tokens, scale2, dropout_key, keep_threshold, keep_scale, head,
    C: tl.constexpr, HEAD_DIM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SANITISE: tl.constexpr,
):  # fmt: skip
    """Add to dK / softmax_scale and dV of the own keys what queries first_query ... stop_query contribute."""
    R: tl.constexpr = k_RD.shape[0]
    D: tl.constexpr = k_RD.shape[1]
    spoilt_k_R = tl.zeros([R], tl.int32)
    spoilt_v_R = tl.zeros([R], tl.int32)
    for first in range(first_query, stop_query, C):
        queries_C = first + tl.arange(0, C)
        q_CD = load_tile(q_ptr, stride_t, first, tokens, C, D, HEAD_DIM)
        grad_CD = load_tile(grad_ptr, grad_stride_t, first, tokens, C, D, HEAD_DIM)
        lse2_C = tl.load(lse2_ptr + queries_C, mask=queries_C < tokens, other=0.0)
        delta_C = tl.load(delta_ptr + queries_C, mask=queries_C < tokens, other=0.0)
        dropped_RC, ds_RC = _transposed_scores(
            k_RD, v_RD, q_CD, grad_CD, lse2_C, delta_C, end_R, first_key, first, common_stop,
            scale2, dropout_key, keep_threshold, keep_scale, head, DROPOUT, PRECISION,
        )  # fmt: skip
        if SANITISE:
            keys_R = first_key + tl.arange(0, R)
            sees_RC = (keys_R[:, None] <= queries_C[None, :]) & (queries_C[None, :] < end_R[:, None])
            q_CD, spoilt_q_C = zero_where_not_finite(q_CD)
            grad_CD, spoilt_grad_C = zero_where_not_finite(grad_CD)
            spoilt_k_R = tl.maximum(spoilt_k_R, tl.max((sees_RC & spoilt_q_C[None, :]).to(tl.int32), axis=1))
            spoilt_v_R = tl.maximum(
                spoilt_v_R, tl.max((sees_RC & spoilt_grad_C[None, :]).to(tl.int32), axis=1)
            )
        dv_RD = tl.dot(dropped_RC, grad_CD, dv_RD, input_precision=PRECISION)
        dk_RD = tl.dot(ds_RC, q_CD, dk_RD, input_precision=PRECISION)
    if SANITISE:
        dk_RD = tl.where(spoilt_k_R[:, None] != 0, float("nan"), dk_RD)
        dv_RD = tl.where(spoilt_v_R[:, None] != 0, float("nan"), dv_RD)
    return dk_RD, dv_RD


@triton.jit
def _backward(
    qkv_ptr,  # [T, H, 3, D], any strides of T, H and 3
    grad_ptr,  # gradient of the output [T, H, D], any strides of T and H
    d_qkv_ptr,  # [T, H, 3, D] contiguous
    lse2_ptr,  # fp32 [H, T]
    delta_ptr,  # fp32 [H, T]
    end_ptr,  # int32 [T]
    key_tiles_ptr,  # int32 [Q, K], TileSchedule
    num_key_tiles_ptr, stop_ptr, common_stop_ptr, order_ptr,  # int32 [Q]
    dropout_key_ptr,  # int64 []
    stride_t, stride_h, stride_3, grad_stride_t, grad_stride_h, key_tiles_stride, tokens,
    scale, scale2, keep_threshold, keep_scale, first_head,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: the heads of a slot lie side by side in memory.
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tile = tl.load(order_ptr + tl.program_id(1))
    first = tile * R
    slots_R = first + tl.arange(0, R)
    q_ptr, grad_ptr = qkv_ptr + head * stride_h, grad_ptr + head * grad_stride_h
    k_ptr, v_ptr = q_ptr + stride_3, q_ptr + 2 * stride_3
    d_q_ptr, d_stride_t = d_qkv_ptr + head * (3 * HEAD_DIM), heads * (3 * HEAD_DIM)
    lse2_ptr, delta_ptr = lse2_ptr + head * tokens, delta_ptr + head * tokens
    key_tiles_ptr += tile.to(tl.int64) * key_tiles_stride
    num_key_tiles = tl.load(num_key_tiles_ptr + tile)
    stop, common_stop = tl.load(stop_ptr + tile), tl.load(common_stop_ptr + tile)
    dropout_key = tl.load(dropout_key_ptr) if DROPOUT else 0
    plane = (first_head + head).to(tl.int32)

    q_RD = load_tile(q_ptr, stride_t, first, tokens, R, D, HEAD_DIM)
    grad_RD = load_tile(grad_ptr, grad_stride_t, first, tokens, R, D, HEAD_DIM)
    lse2_R = tl.load(lse2_ptr + slots_R, mask=slots_R < tokens, other=0.0)
    delta_R = tl.load(delta_ptr + slots_R, mask=slots_R < tokens, other=0.0)
    dq_RD = _query_gradient(
        q_RD, grad_RD, lse2_R, delta_R, k_ptr, v_ptr, stride_t, end_ptr, key_tiles_ptr,
        num_key_tiles - R // C, first, tokens, scale2, dropout_key, keep_threshold, keep_scale, plane,
        C, HEAD_DIM, DROPOUT, PRECISION, False,
    )  # fmt: skip

    k_RD = load_tile(k_ptr, stride_t, first, tokens, R, D, HEAD_DIM)
    v_RD = load_tile(v_ptr, stride_t, first, tokens, R, D, HEAD_DIM)
    end_R = tl.load(end_ptr + slots_R, mask=slots_R < tokens, other=0)
    dropped_RR, ds_RR = _transposed_scores(
        k_RD, v_RD, q_RD, grad_RD, lse2_R, delta_R, end_R, first, first, common_stop,
        scale2, dropout_key, keep_threshold, keep_scale, plane, DROPOUT, PRECISION,
    )  # fmt: skip
    dq_RD = tl.dot(tl.trans(ds_RR), k_RD, dq_RD, input_precision=PRECISION)
    if holds_nan(dq_RD):
        dq_RD = _query_gradient(
            q_RD, grad_RD, lse2_R, delta_R, k_ptr, v_ptr, stride_t, end_ptr, key_tiles_ptr,
            num_key_tiles, first, tokens, scale2, dropout_key, keep_threshold, keep_scale, plane,
            C, HEAD_DIM, DROPOUT, PRECISION, True,
        )  # fmt: skip
    store_tile(d_q_ptr, d_stride_t, first, tokens, dq_RD * scale, HEAD_DIM)

    zero_RD = tl.zeros([R, D], tl.float32)
    dv_RD = tl.dot(dropped_RR, grad_RD, zero_RD, input_precision=PRECISION)
    dk_RD = tl.dot(ds_RR, q_RD, zero_RD, input_precision=PRECISION)
    dk_RD, dv_RD = _key_value_gradients(
        dk_RD, dv_RD, k_RD, v_RD, q_ptr, stride_t, grad_ptr, grad_stride_t, lse2_ptr, delta_ptr, end_R, first,
        first + R, stop, common_stop, tokens, scale2, dropout_key, keep_threshold, keep_scale, plane,
        C, HEAD_DIM, DROPOUT, PRECISION, False,
    )  # fmt: skip
    if holds_nan(dk_RD) | holds_nan(dv_RD):
        dk_RD, dv_RD = _key_value_gradients(
            zero_RD, zero_RD, k_RD, v_RD, q_ptr, stride_t, grad_ptr, grad_stride_t, lse2_ptr, delta_ptr,
            end_R, first, first, stop, common_stop, tokens, scale2, dropout_key, keep_threshold, keep_scale,
            plane, C, HEAD_DIM, DROPOUT, PRECISION, True,
        )  # fmt: skip
    store_tile(d_q_ptr + HEAD_DIM, d_stride_t, first, tokens, dk_RD * scale, HEAD_DIM)
    store_tile(d_q_ptr + 2 * HEAD_DIM, d_stride_t, first, tokens, dv_RD, HEAD_DIM)
