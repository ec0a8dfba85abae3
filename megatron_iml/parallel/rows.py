"""Deals the rows of one step to data-parallel ranks: a pure function of the rows' costs, known to every rank.

All rows have one shape, so matrix products cost the same; attention (visible pairs) and the LM head (targets)
do not. Heaviest row first, each to the rank with the least work that still has room:

    costs [9, 1, 1, 5], two ranks of two rows   ->   [[0, 2], [1, 3]]   (10 and 6; the order of rows is kept)

Few rows a rank leave some ranks heavier than they need be, so they then swap rows as long as that helps:

    costs [8, 7, 6, 5, 4, 0], two ranks of three   ->   8 5 4 and 7 6 0, 17 and 13; 8 for 6 makes both 15

Where that does not help enough, the same swaps begin from the rows as they lie: a plan puts rows that cost
alike together into groups of four (data/plan/balance.py). The better of the two counts.

Suffixes: G ranks, K rows of a rank, N rows of the step.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.plan.balance import swap_rows

# A rank that is this little above the mean costs less time than steps differ by anyway.
EVEN = 1.001


def deal_rows(costs: Sequence[float], data_parallel_size: int) -> list[list[int]]:
    """Split the step's rows evenly in number and as evenly as greedy choice and swaps give in cost.

    Args:
        costs: useful FLOPs of each row of the step, in the plan's order; their number is a multiple of
            data_parallel_size.
        data_parallel_size: number of ranks.

    Returns:
        For each rank its rows as indices into `costs`, ascending.
    """
    rows_per_rank, rest = divmod(len(costs), data_parallel_size)
    assert rest == 0, f"{len(costs)} rows cannot be dealt evenly to {data_parallel_size} ranks"
    dealt: list[list[int]] = [[] for _ in range(data_parallel_size)]
    # Already a heap. Ties go to the lower rank, so that all ranks deal alike.
    loads = [(0.0, rank) for rank in range(data_parallel_size)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(row)
        # A full rank leaves the heap; there is always another, because the counts are equal.
        if len(dealt[rank]) < rows_per_rank:
            heapq.heappush(loads, (load + costs[row], rank))
    costs_N = np.array(costs, dtype=np.float64)
    dealt_GK = swap_rows(np.array(dealt), costs_N, EVEN)
    if _heaviest(dealt_GK, costs_N) > EVEN * costs_N.sum() / data_parallel_size:
        as_they_lie = np.arange(len(costs)).reshape(data_parallel_size, rows_per_rank)
        dealt_GK = min(
            dealt_GK, swap_rows(as_they_lie, costs_N, EVEN), key=lambda each: _heaviest(each, costs_N)
        )
    # In the order of the plan: gradients are then summed in one order for one data-parallel size.
    return np.sort(dealt_GK, axis=1).tolist()


def _heaviest(dealt_GK: NDArray[np.int64], costs: NDArray[np.float64]) -> float:
    return float(costs[dealt_GK].sum(axis=1).max())
