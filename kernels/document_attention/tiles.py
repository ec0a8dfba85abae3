"""What the forward and the backward kernels share: moving tiles, the mask of a tile, and the search for NaN.

A tile is [N, D]: N neighbouring slots of one head's query, key, value or gradient; D is the head size rounded
up to a power of two. Tiles are read by the copy engine through descriptors, which cost no registers and give
zeros outside of the tensor. Where the head size is D and a slot's heads lie inside its row (FLAT), the tensor
is a matrix [T, row] to the engine, the fastest form; else it is what it is, [T, H, 3, D]. Results whose head
size is D leave through the engine too.
"""

import triton
import triton.language as tl


@triton.jit
def load_part(
    qkv, stride_h, stride_3, first, head, part, N: tl.constexpr, D: tl.constexpr, FLAT: tl.constexpr
):
    """Tile [N, D] from slot `first` on: the query (part 0), key (1) or value (2) of a head."""
    # Slots beyond the row read as zeros: scores of 0, which the mask takes out, and gradients of 0.
    if FLAT:
        tile_ND = qkv.load([first, head * stride_h + part * stride_3])
    else:
        tile_ND = qkv.load([first, head, part, 0]).reshape(N, D)
    return tile_ND


@triton.jit
def load_gradient(grad, first, head, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Tile [N, D] of a contiguous tensor [T, H, HEAD_DIM]."""
    # A box wider than the head would read its neighbour's features from the matrix, not zeros.
    if HEAD_DIM == D:
        tile_ND = grad.load([first, head * D])
    else:
        tile_ND = grad.load([first, head, 0]).reshape(N, D)
    return tile_ND


@triton.jit
def addresses(pointer, stride, first, tokens, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Addresses [N, D] and which of them exist. Inside a tile 32 bits are enough, on the way to it not."""
    # [N] and [D]; D is the head size rounded up, so features may be missing as well as slots.
    slots_N, dims_D = tl.arange(0, N), tl.arange(0, D)
    pointers_ND = pointer + tl.cast(first, tl.int64) * stride + (slots_N[:, None] * stride + dims_D[None, :])
    exists_ND = (first + slots_N < tokens)[:, None] & (dims_D < HEAD_DIM)[None, :]
    return pointers_ND, exists_ND


@triton.jit
def store_tile(matrix, pointer, stride, first, column, tokens, tile_ND, HEAD_DIM: tl.constexpr):
    """Store a tile, rounded to the pointer's type, at slot `first` and `column` of a matrix [T, stride]."""
    # The copy engine takes less work and fewer registers than an address a thread. Its box is as wide as the
    # tile: where that is wider than the head, there is no matrix to write it to.
    if tile_ND.shape[1] == HEAD_DIM:
        matrix.store([first, column], tile_ND.to(pointer.dtype.element_ty))
    else:
        pointers_ND, exists_ND = addresses(
            pointer + column, stride, first, tokens, tile_ND.shape[0], tile_ND.shape[1], HEAD_DIM
        )
        tl.store(pointers_ND, tile_ND.to(pointer.dtype.element_ty), mask=exists_ND)


@triton.jit
def prefetch_tile(pointer, stride, first, tokens, N: tl.constexpr, D: tl.constexpr):
    """Ask for a tile, to find it in the second-level cache later."""
    # A cache line of 128 bytes holds 64 numbers of 16 bits. (Of fp32 every second line is asked for.)
    LINES: tl.constexpr = (D + 63) // 64
    slots_N = tl.minimum(first + tl.arange(0, N), tokens - 1)
    pointers_NL = pointer + tl.cast(slots_N, tl.int64)[:, None] * stride + 64 * tl.arange(0, LINES)[None, :]
    # The language has no word for it. An expression must have a value: it is not used.
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers_NL.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def visible(rows_R, columns_C, end_ptr, tokens):
    """The mask of a tile, bool [R, C]: column <= row < end[column]."""
    # Columns beyond the row end at 0: nobody sees them.
    end_C = tl.load(end_ptr + columns_C, mask=columns_C < tokens, other=0)
    return (columns_C[None, :] <= rows_R[:, None]) & (rows_R[:, None] < end_C[None, :])


@triton.jit
def zero_where_not_finite(tile_ND):
    """Return the tile with NaN and infinities zeroed, and [N]: does the slot hold any of them."""
    # One comparison for both: NaN is not below infinity either.
    finite_ND = tl.abs(tile_ND.to(tl.float32)) < float("inf")
    return tl.where(finite_ND, tile_ND, 0.0), tl.min(finite_ND.to(tl.int32), axis=1) == 0


@triton.jit
def sees_any(sees_RC, marked_C, before_R):
    """int32 [R]: 1 where `before_R` is 1 or the row sees a marked column."""
    return tl.maximum(before_R, tl.max((sees_RC & marked_C[None, :]).to(tl.int32), axis=1))


@triton.jit
def nan_rows(tile_ND):
    """bool [N]: does the row hold a NaN, or infinities of both signs, which are taken for one."""
    # One sum in place of a comparison a feature: every finite run pays for this search.
    total_N = tl.sum(tile_ND, axis=1)
    return total_N != total_N
