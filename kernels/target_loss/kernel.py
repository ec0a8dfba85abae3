"""What happens to a chunk of logits [m, V] between the GEMMs, and to the rows of the hidden gradient after.

    statistics   logits -> maximum, sum of exp(logit - maximum), logit of the target
    gradient     logits -> scale * (exp(logit - maximum) / sum - onehot), in place
    scatter      d_hidden of targets -> d_hidden of slots, equal rows added in fixed order

Under vocabulary parallelism maximum and sum are reduced between the first two. On a single rank one program
does both to its row, which is still in the cache when it is read again: memory moves the logits twice instead
of three times. The arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _overwrite(row_ptr, columns, maximum, total, local_id, scale_ptr, NUM_VOCAB: tl.constexpr):
    """Replace the logits of some columns of a row by their gradient. `scale_ptr`: fp32 [], or None for 1."""
    mask = columns < NUM_VOCAB
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    logits = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    # Scaled in fp32, before the store rounds: unscaled, many are below fp16's smallest number.
    probabilities = tl.exp(logits - maximum) * tl.div_rn(scale, total)
    gradient = probabilities - tl.where(columns == local_id, scale, 0.0)
    tl.store(row_ptr + columns, gradient.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(
    logits_ptr,  # [m, V], rows `stride` apart; overwritten if GRADIENT
    ids_ptr,  # int64 [m], of the whole vocabulary
    out_ptr,  # fp32 [3, m]: maximum, sum, target logit (0 where another rank has it)
    scale_ptr,  # fp32 [], or None for 1
    stride,  # elements between rows of logits: V rounded up to 8
    vocab_start,  # id of column 0
    NUM_VOCAB: tl.constexpr,
    GRADIENT: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    num_rows = tl.num_programs(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    # Every lane keeps its own maximum and sum, so the loop has no reduction across lanes; it looks at STEPS
    # logits at once, so that its sum is rescaled once for all of them.
    maximum = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    # [STEPS, LANES]: neighbouring lanes read neighbouring logits.
    offsets = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for first in range(0, NUM_VOCAB, STEPS * LANES):
        columns = first + offsets  # [STEPS, LANES]
        logits = tl.load(row_ptr + columns, mask=columns < NUM_VOCAB, other=float("-inf")).to(tl.float32)
        # A NaN is lost in these maxima, but not in the sum below.
        larger = tl.maximum(maximum, tl.max(logits, axis=0))
        # A lane that has seen nothing yet must not compute -inf - -inf.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(logits - base[None, :]), axis=0)
        maximum = larger
    local_id = tl.load(ids_ptr + row) - vocab_start
    # Zero elsewhere: the sum over the vocabulary's ranks is the logit of whoever has it.
    is_here = (local_id >= 0) & (local_id < NUM_VOCAB)
    target = tl.load(row_ptr + local_id, mask=is_here, other=0.0).to(tl.float32)
    # A lane beyond the vocabulary has -inf and 0: its factor exp(-inf) is 0.
    row_maximum = tl.max(maximum, axis=0)
    row_total = tl.sum(total * tl.exp(maximum - row_maximum), axis=0)
    tl.store(out_ptr + row, row_maximum)
    tl.store(out_ptr + num_rows + row, row_total)
    tl.store(out_ptr + 2 * num_rows + row, target)
    if GRADIENT:
        # No thread may overwrite a logit that another has still to read.
        tl.debug_barrier()
        for first in range(0, NUM_VOCAB, STEPS * LANES):
            _overwrite(row_ptr, first + offsets, row_maximum, row_total, local_id, scale_ptr, NUM_VOCAB)


@triton.jit
def _gradient(
    logits_ptr,  # [m, V], rows `stride` apart, overwritten
    ids_ptr,  # int64 [m]
    statistics_ptr,  # fp32 [3, m]: maximum, sum, and a row that is not read
    scale_ptr,  # fp32 [], or None for 1
    stride,  # elements between rows of logits
    vocab_start,  # id of column 0
    NUM_VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    maximum = tl.load(statistics_ptr + row)
    total = tl.load(statistics_ptr + tl.num_programs(1) + row)
    local_id = tl.load(ids_ptr + row) - vocab_start
    _overwrite(row_ptr, columns, maximum, total, local_id, scale_ptr, NUM_VOCAB)


@triton.jit
def _scatter(
    source_ptr,  # [M, F], in the order of targets
    order_ptr,  # int64 [M]: positions in `source`, sorted by slot, stable
    rows_ptr,  # int32 [M]: slots in that order
    factor_ptr,  # fp32 []
    out_ptr,  # [T, F], zero where no target is
    num_targets,  # M
    NUM_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    slot = tl.load(rows_ptr + first).to(tl.int64)
    previous = tl.load(rows_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    # The program of a slot's first target adds up all of them; the others have nothing to do.
    if slot != previous:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        mask = columns < NUM_FEATURES
        # fp32, in the order of targets: one owner and one order a slot, so a repeat is equal bit for bit.
        total = tl.zeros([BLOCK], tl.float32)
        position = first
        same = slot
        while same == slot:
            source = tl.load(order_ptr + position)
            total += tl.load(source_ptr + source * NUM_FEATURES + columns, mask=mask, other=0.0).to(
                tl.float32
            )
            position += 1
            # -1 behind the last target: no slot, so the loop ends.
            same = tl.load(rows_ptr + position, mask=position < num_targets, other=-1).to(tl.int64)
        total *= tl.load(factor_ptr)
        tl.store(out_ptr + slot * NUM_FEATURES + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


STATISTICS_TILE = (4, 512, 2)
FUSED_TILE = (2, 4096, 16)
"""Logits a lane looks at together, lanes, warps; measured on an H100, as the next."""

GRADIENT_TILE = (8192, 8)
"""Columns of a program, warps."""


def run_statistics(
    logits_mV: Tensor, ids_m: Tensor, vocab_start: int, tile: tuple[int, int, int] = STATISTICS_TILE
) -> Tensor:
    """fp32 [3, m]: each row's maximum, sum of exp(logit - maximum), and target logit (0 if not here)."""
    return _run_rows(logits_mV, ids_m, None, vocab_start, False, tile)


def run_fused(
    logits_mV: Tensor,
    ids_m: Tensor,
    scale: Tensor | None,
    vocab_start: int,
    tile: tuple[int, int, int] = FUSED_TILE,
) -> Tensor:
    """Statistics and gradient at once, of a row that no other rank has a part of."""
    return _run_rows(logits_mV, ids_m, scale, vocab_start, True, tile)


def _run_rows(
    logits_mV: Tensor,
    ids_m: Tensor,
    scale: Tensor | None,
    vocab_start: int,
    gradient: bool,
    tile: tuple[int, int, int],
) -> Tensor:
    num_rows, num_vocab = logits_mV.shape
    steps, lanes, num_warps = tile
    out = torch.empty(3, num_rows, dtype=torch.float32, device=logits_mV.device)
    _statistics[(num_rows,)](
        logits_mV,
        ids_m,
        out,
        scale,
        logits_mV.stride(0),
        vocab_start,
        NUM_VOCAB=num_vocab,
        GRADIENT=gradient,
        STEPS=steps,
        LANES=lanes,
        num_warps=num_warps,
    )
    return out


def run_gradient(
    logits_mV: Tensor,
    ids_m: Tensor,
    statistics: Tensor,
    scale: Tensor | None,
    vocab_start: int,
    tile: tuple[int, int] = GRADIENT_TILE,
) -> None:
    """Overwrite logits with the loss's gradient, times `scale`; `statistics` are of the whole vocabulary."""
    num_rows, num_vocab = logits_mV.shape
    block, num_warps = tile
    # Rows are on the second axis, of which CUDA takes 65,535: the most a chunk may have on several ranks.
    _gradient[(triton.cdiv(num_vocab, block), num_rows)](
        logits_mV,
        ids_m,
        statistics,
        scale,
        logits_mV.stride(0),
        vocab_start,
        NUM_VOCAB=num_vocab,
        BLOCK=block,
        num_warps=num_warps,
    )


def run_scatter(source_MF: Tensor, target_rows_M: Tensor, factor: Tensor, num_slots: int) -> Tensor:
    """[slots, F]: the sum of each slot's rows of `source`, times `factor`; 0 for a slot without targets."""
    num_targets, num_features = source_MF.shape
    # The kernel writes slots that have targets, and no others.
    out_TF = source_MF.new_zeros(num_slots, num_features)
    if num_targets:
        # A radix sort takes half the time on half the bits.
        rows_M, order_M = torch.sort(target_rows_M.to(torch.int32), stable=True)
        block = min(1024, triton.next_power_of_2(num_features))
        _scatter[(num_targets, triton.cdiv(num_features, block))](
            source_MF, order_M, rows_M, factor, out_TF, num_targets, NUM_FEATURES=num_features, BLOCK=block
        )
    return out_TF
