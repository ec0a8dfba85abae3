"""The masks of `philox.py` inside Triton kernels, bit for bit: Triton's Philox on the same counters.

    keep_tile     a whole tile [R, C] whose first column divides by 4: one Philox call serves 4 columns

`key` is the int64 whose 64 bits are the Philox key, `threshold` is `philox.keep_threshold(probability)`.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(key, threshold, rows_R, first_column, plane, COLUMNS: tl.constexpr):
    """Keep mask, bool [R, COLUMNS], of global rows and the columns from `first_column` (divides by 4)."""
    # G = COLUMNS / 4. The counter has to be int32: from a counter of 64 bits tl.philox makes other words.
    groups_G = first_column // 4 + tl.arange(0, COLUMNS // 4)
    zero_RG = rows_R[:, None] * 0 + groups_G[None, :] * 0
    row_RG, group_RG = zero_RG + rows_R[:, None], zero_RG + groups_G[None, :]
    word0, word1, word2, word3 = tl.philox(key, row_RG, group_RG, zero_RG + plane, zero_RG)
    # The launch passes thresholds from 2^31 on as int64; words are unsigned, and so is the comparison.
    least = threshold.to(tl.uint32)
    # Bytes, not words, are put in order: a fourth of the traffic between threads.
    keep0, keep1 = (word0 >= least).to(tl.int8), (word1 >= least).to(tl.int8)
    keep2, keep3 = (word2 >= least).to(tl.int8), (word3 >= least).to(tl.int8)
    # interleave(a, b) is a0 b0 a1 b1 ...: two levels put the words of every group in the order 0 1 2 3.
    return tl.interleave(tl.interleave(keep0, keep2), tl.interleave(keep1, keep3)) != 0
