"""Sharing examples out and putting them together."""

import pytest

from megatron_iml.evaluation.replicas import merge, shard


@pytest.mark.parametrize(("total", "size"), [(0, 3), (1, 3), (5, 2), (6, 3), (7, 7), (2, 5)])
def test_merge_undoes_shard(total: int, size: int) -> None:
    items = list(range(total))
    assert merge([shard(items, rank, size) for rank in range(size)]) == items


def test_shard_by_hand() -> None:
    assert [shard("abcde", rank, 2) for rank in range(2)] == ["ace", "bd"]


def test_a_lost_item_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"4 items over 2 ranks make shards of \[2, 2\], got \[3, 1\]"):
        merge(["ace", "b"])
