"""Deals the rows of one step to data-parallel ranks: a pure function of the rows' costs, known to every rank.

All rows have one shape, so matrix products cost the same; attention (visible pairs) and the LM head (targets)
do not. Heaviest row first, each to the rank with the least work that still has room:

    costs [9, 1, 1, 5], two ranks of two rows   ->   [[0, 2], [1, 3]]   (10 and 6; the order of rows is kept)
"""

import heapq
from collections.abc import Sequence


def deal_rows(costs: Sequence[float], data_parallel_size: int) -> list[list[int]]:
    """Split the step's rows evenly in number and as evenly as greedy choice gives in cost.

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
    # In the order of the plan: gradients are then summed in one order for one data-parallel size.
    return [sorted(rows) for rows in dealt]
