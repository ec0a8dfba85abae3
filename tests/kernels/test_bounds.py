"""`start_T` against its definition, and the trees of the module's head."""

import pytest
import torch
from forests import random_end

from megatron_iml.kernels.document_attention import DocumentBounds


def first_visible(end: list[int], row: int) -> int:
    """The definition, literally: the first column a row sees; its own index if it sees none."""
    return next((col for col in range(row + 1) if row < end[col]), row)


@pytest.mark.parametrize(
    ("end", "start"),
    [
        ([3, 3, 3, 5, 5, 5], [0, 0, 0, 3, 3, 5]),  # two documents, then padding
        ([5, 5, 4, 4, 5], [0, 0, 0, 0, 0]),  # a trunk of 2 slots with branches of 2 and 1
        ([1, 2, 3], [0, 1, 2]),  # documents of one slot
        ([0, 1, 2], [0, 1, 2]),  # nothing but padding
        ([0, 3, 3, 3, 6, 6], [0, 1, 1, 3, 4, 4]),  # padding before and between
    ],
)
def test_by_hand(end: list[int], start: list[int]) -> None:
    assert DocumentBounds.from_end(torch.tensor(end, dtype=torch.int32)).start_T.tolist() == start


def test_start_is_the_first_visible_column() -> None:
    for seed in range(500):
        end_T = random_end(seed)
        start_T = DocumentBounds.from_end(end_T).start_T
        assert start_T.dtype == torch.int32
        expected = [first_visible(end_T.tolist(), row) for row in range(end_T.numel())]
        assert start_T.tolist() == expected, f"seed {seed}: end {end_T.tolist()}"
