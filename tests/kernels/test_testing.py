"""The measure itself: what the error budget lets pass, what poison shows, rows that are what they claim."""

import pytest
import torch
from torch import Tensor

from megatron_iml.kernels.testing import (
    assert_within_budget,
    documents_end,
    max_error,
    nan_poison,
    random_forest_end,
    tree_end,
)

NAN, INF = float("nan"), float("inf")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


def test_twice_the_error_of_torch_passes_and_more_does_not() -> None:
    truth, by_torch = numbers(1.0, 2.0), numbers(1.0, 2.5)
    # One unit in the last place of 2.0 comes on top; these are far from it on either side.
    assert_within_budget("x", numbers(1.99, 2.0), by_torch, truth)
    with pytest.raises(AssertionError, match=r"x: error 1\.01.* exceeds 1\.0"):
        assert_within_budget("x", numbers(2.01, 2.0), by_torch, truth)
    assert_within_budget("x", numbers(2.01, 2.0), by_torch, truth, factor=3.0)


@pytest.mark.parametrize(
    ("result", "by_torch", "truth"),
    [
        # A NaN that nobody else has, or that is missing.
        (numbers(NAN, 1.0), numbers(0.0, 1.0), numbers(0.0, 1.0)),
        (numbers(0.0, 1.0), numbers(NAN, 1.0), numbers(NAN, 1.0)),
        # Where torch fails, nothing would be an error.
        (numbers(0.0, 9.0), numbers(NAN, 1.0), numbers(0.0, 1.0)),
        (numbers(0.0, 9.0), numbers(INF, 1.0), numbers(0.0, 1.0)),
        # An infinity of the truth is no scale for what stands beside it.
        (numbers(INF, 9.0), numbers(INF, 1.0), numbers(INF, 1.0)),
        (numbers(-INF, 1.0), numbers(INF, 1.0), numbers(INF, 1.0)),
    ],
)
def test_what_is_not_finite_loosens_nothing(result: Tensor, by_torch: Tensor, truth: Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_within_budget("x", result, by_torch, truth)


def test_what_all_agree_on_is_no_error() -> None:
    same = numbers(NAN, INF, -INF, 3.0)
    assert max_error(same, same) == 0.0
    assert_within_budget("x", same, same, same)
    assert max_error(torch.empty(0), torch.empty(0)) == 0.0


def test_poison_is_in_all_fresh_memory_and_gone_afterwards() -> None:
    with pytest.raises(RuntimeError, match="an op that fails"), nan_poison():
        fresh = [torch.empty(3), torch.zeros(2).new_empty(3), torch.empty_like(torch.zeros(3).half())]
        assert all(tensor.isnan().all() for tensor in fresh)
        # Integers have no NaN: what is unwritten is an index far outside.
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        raise RuntimeError("an op that fails")
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_rows_of_the_modules_head() -> None:
    assert documents_end([3, 2], padding=1).tolist() == [3, 3, 3, 5, 5, 5]
    assert tree_end(2, [2, 1]).tolist() == [5, 5, 4, 4, 5]


def test_random_forests_are_forests_and_of_every_kind() -> None:
    kinds = set()
    for seed in range(50):
        end = random_forest_end(seed, 80, 20).tolist()
        assert len(end) == 80
        for column, stop in enumerate(end):
            assert column <= stop <= 80
            # Intervals are nested or disjoint: no column is seen by rows that a trunk of it is not.
            inside = end[column + 1 : stop]
            assert all(other <= stop for other in inside), f"seed {seed}, column {column}"
            kinds.add("padding" if stop == column else "branches" if min(inside, default=stop) < stop else "")
    assert kinds == {"", "padding", "branches"}
