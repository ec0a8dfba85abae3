"""Dealing rows: equal counts, every row once, near balance, and nothing but the costs decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.parallel.rows import deal_rows


def test_the_worked_example() -> None:
    assert deal_rows([9, 1, 1, 5], 2) == [[0, 2], [1, 3]]


def test_equal_costs_go_round_and_one_rank_gets_all() -> None:
    assert deal_rows([1.0] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert deal_rows([3.0, 1.0, 2.0], 1) == [[0, 1, 2]]


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.floats(0, 1e15), min_size=1, max_size=12), ranks=st.sampled_from([1, 2, 3, 4, 8]))
def test_every_row_is_dealt_once_in_order_and_evenly(costs: list[float], ranks: int) -> None:
    costs = costs * ranks
    dealt = deal_rows(costs, ranks)
    assert dealt == deal_rows(list(costs), ranks)
    assert {len(rows) for rows in dealt} == {len(costs) // ranks}
    assert all(rows == sorted(rows) for rows in dealt)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))


def test_balance_on_rows_of_real_spread() -> None:
    # Useful FLOPs of full rows differ by a third or so; 32 rows a rank, as a real step has.
    rng = np.random.default_rng(0)
    for ranks in (2, 4, 8, 16):
        costs = rng.uniform(0.8, 1.2, 32 * ranks)
        loads = [costs[rows].sum() for rows in deal_rows(costs.tolist(), ranks)]
        in_order = costs.reshape(ranks, 32).sum(1)
        assert max(loads) / np.mean(loads) < 1.002
        assert max(loads) / np.mean(loads) < max(in_order) / np.mean(in_order)


def test_rows_that_do_not_divide_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="5 rows cannot be dealt evenly to 2 ranks"):
        deal_rows([1.0] * 5, 2)
