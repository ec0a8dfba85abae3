"""Trees of documents with common beginnings: worked by hand, and against a plain prefix tree."""

from collections.abc import Sequence
from itertools import pairwise, product
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.plan import prefixes
from megatron_iml.data.plan.prefixes import Forest, hang_documents, separate_documents
from megatron_iml.data.rows.assemble import Piece, assemble_row


@pytest.fixture
def shortest_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "SHORTEST_PREFIX", 2)


def documents(*tokens: Sequence[int]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.uint16) for ids in tokens]


@pytest.mark.usefixtures("shortest_two")
def test_the_worked_example() -> None:
    tokens = documents(
        [10, 11, 12, 20, 21, 2], [70, 71, 2], [10, 11, 40, 2], [10, 11, 12, 13, 2], [10, 11, 12, 20, 2]
    )
    forest = hang_documents(tokens, branches=9, max_slots=100)
    # Two before 20: the document that ends first is met first. The tree comes first: it holds document 0.
    assert forest.order_P.tolist() == [3, 4, 0, 2, 1]
    assert forest.tree_P.tolist() == [0, 0, 0, 0, 1]
    assert forest.shared_P.tolist() == [0, 3, 4, 2, 0]
    assert sum(len(t) - 1 for t in tokens) - forest.shared_P.sum() == 9


@pytest.mark.usefixtures("shortest_two")
def test_a_run_is_cut_where_least_is_lost() -> None:
    tokens = documents(*([5, 6, 7, 8, i, 2] for i in range(3)), *([5, 6, 9, 9, 9, i, 2] for i in range(3)))
    # In threes the cut falls between 5 6 7 8 and 5 6 9: only the 2 common tokens are lost.
    forest = hang_documents(tokens, branches=2, max_slots=100)
    assert forest.tree_P.tolist() == [0, 0, 0, 1, 1, 1]
    assert forest.shared_P.tolist() == [0, 4, 4, 0, 5, 5]
    # In fours greedy pieces of 4 and 2 would lose 5 tokens; 3 and 3 still lose 2.
    assert hang_documents(tokens, branches=3, max_slots=100).shared_P.tolist() == [0, 4, 4, 0, 5, 5]
    # Three documents take 5 + 1 + 1 slots and 6 + 1 + 1.
    assert hang_documents(tokens, branches=2, max_slots=7).tree_P.tolist() == [0, 0, 0, 1, 1, 2]


def test_prefixes_below_32_tokens_are_not_shared() -> None:
    common = list(range(100, 131))
    tokens = documents([*common, 7, 2], [*common, 8, 2])
    assert hang_documents(tokens, 3, 100).tree_P.tolist() == [0, 1]
    common.append(131)
    tokens = documents([*common, 7, 2], [*common, 8, 2])
    assert hang_documents(tokens, 3, 100).shared_P.tolist() == [0, 32]
    # The same document twice: all but the last token, which is never read.
    tokens = documents([*common, 7, 2], [*common, 7, 2])
    assert hang_documents(tokens, 3, 100).shared_P.tolist() == [0, 33]


def test_nothing_to_share() -> None:
    assert hang_documents([], 3, 100).order_P.tolist() == []
    forest = separate_documents(3)
    assert (forest.order_P.tolist(), forest.tree_P.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert forest.shared_P.tolist() == [0, 0, 0]


def check_trees(tokens: list[np.ndarray], forest: Forest, most: int, max_slots: int) -> None:
    assert sorted(forest.order_P.tolist()) == list(range(len(tokens)))
    firsts = []
    for tree in range(int(forest.tree_P.max()) + 1):
        here = np.flatnonzero(forest.tree_P == tree)
        assert np.array_equal(here, np.arange(here[0], here[-1] + 1))
        members, shared = forest.order_P[here], forest.shared_P[here]
        firsts.append(members.min())
        # The loader's own checks: depth first, longest prefix first, equal tokens.
        pieces = [
            Piece(tokens[d], 1, place - 1, int(s))
            for place, (d, s) in enumerate(zip(members, shared, strict=True))
        ]
        slots = int(sum(len(tokens[d]) - 1 for d in members) - shared.sum())
        assert assemble_row(pieces, slots, 0).layout.num_real == slots
        assert len(members) <= most
        assert len(members) == 1 or slots <= max_slots
        # What a prefix tree of these documents would store: every distinct beginning once.
        nodes = {tuple(tokens[d][: n + 1].tolist()) for d in members for n in range(len(tokens[d]) - 1)}
        assert slots == len(nodes)
    assert firsts == sorted(firsts)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 25), branches=st.integers(1, 6))
def test_random_documents(seed: int, count: int, branches: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 5, size=rng.integers(2, 9)).astype(np.uint16) for _ in range(count)]
    with mock.patch.object(prefixes, "SHORTEST_PREFIX", 2):
        forest = hang_documents(tokens, branches, max_slots=12)
    check_trees(tokens, forest, 1 + branches, 12)


@settings(max_examples=100, deadline=None)
@given(
    run=st.lists(st.tuples(st.integers(3, 9), st.integers(1, 3)), min_size=1, max_size=8),
    most=st.integers(1, 5),
    max_slots=st.integers(9, 30),
)
def test_no_other_cuts_save_more(run: list[tuple[int, int]], most: int, max_slots: int) -> None:
    slots, shared = [slots for slots, _ in run], [shared for _, shared in run]

    def saved(pieces: list[tuple[int, int]]) -> int:
        return sum(sum(shared[first + 1 : last]) for first, last in pieces)

    def allowed(first: int, last: int) -> bool:
        taken = sum(slots[first:last]) - sum(shared[first + 1 : last])
        return last - first == 1 or (last - first <= most and taken <= max_slots)

    best = 0
    for cuts in product([False, True], repeat=len(run) - 1):
        edges = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(run)]
        pieces = list(pairwise(edges))
        if all(allowed(first, last) for first, last in pieces):
            best = max(best, saved(pieces))
    ours = prefixes._cut_run(slots, shared, most, max_slots)
    assert [last for _, last in ours[:-1]] == [first for first, _ in ours[1:]]
    assert (ours[0][0], ours[-1][1]) == (0, len(run))
    assert all(allowed(first, last) for first, last in ours)
    assert saved(ours) == best
