"""What the forward and the backward kernels share: moving tiles of the fused projection, and the mask.

A tile is [N, D]: N neighbouring slots of one head's query, key or value. Pointers are to the slot's first
element of that head; offsets inside a tile fit 32 bits, the way to the tile takes 64.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, stride, first, tokens, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Tile [N, D] from slot `first` on; zero beyond `tokens` and beyond HEAD_DIM."""
    slots_N, dims_D = tl.arange(0, N), tl.arange(0, D)
    addresses_ND = pointer + tl.cast(first, tl.int64) * stride + (slots_N[:, None] * stride + dims_D[None, :])
    mask_ND = (first + slots_N < tokens)[:, None]
    if HEAD_DIM != D:
        mask_ND = mask_ND & (dims_D < HEAD_DIM)[None, :]
    return tl.load(addresses_ND, mask=mask_ND, other=0.0)


@triton.jit
def store_tile(pointer, stride, first, tokens, tile_ND, HEAD_DIM: tl.constexpr):
    """Store a tile, rounded to the pointer's type."""
    N: tl.constexpr = tile_ND.shape[0]
    D: tl.constexpr = tile_ND.shape[1]
    slots_N, dims_D = tl.arange(0, N), tl.arange(0, D)
    addresses_ND = pointer + tl.cast(first, tl.int64) * stride + (slots_N[:, None] * stride + dims_D[None, :])
    mask_ND = (first + slots_N < tokens)[:, None]
    if HEAD_DIM != D:
        mask_ND = mask_ND & (dims_D < HEAD_DIM)[None, :]
    tl.store(addresses_ND, tile_ND.to(pointer.dtype.element_ty), mask=mask_ND)


@triton.jit
def zero_where_not_finite(tile_ND):
    """Return the tile with NaN and infinities zeroed, and [N]: does the slot hold any of them."""
    finite_ND = tl.abs(tile_ND.to(tl.float32)) < float("inf")
    return tl.where(finite_ND, tile_ND, 0.0), tl.min(finite_ND.to(tl.int32), axis=1) == 0


@triton.jit
def holds_nan(tile_ND):
    """Whether any element is NaN (or infinities of both signs meet in the sum: a false alarm)."""
    total = tl.sum(tl.sum(tile_ND, axis=1), axis=0)
    return total != total
