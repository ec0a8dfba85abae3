"""Rows: hand-worked examples, and random forests against the plain definition of what a document sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.rows.assemble import Piece, Row, assemble_row


def visible_slots(row: Row, slot: int) -> set[int]:
    """The rule the attention kernels follow, literally."""
    return {col for col in range(slot + 1) if slot < row.layout.end_T[col]}


def piece(tokens: list[int], source_length: int, trunk: int = -1, shared: int = 0) -> Piece:
    return Piece(np.array(tokens, dtype=np.uint16), source_length, trunk, shared)


def test_two_documents_by_hand() -> None:
    row = assemble_row([piece([10, 11, 12, 2], 2), piece([20, 21, 2], 1)], row_length=7, index=5)
    assert row.layout.index == 5
    assert row.layout.num_real == 5
    assert row.layout.num_targets == 4
    assert row.tokens_T.tolist() == [10, 11, 12, 20, 21, 1, 1]
    assert row.layout.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert row.layout.end_T.tolist() == [3, 3, 3, 5, 5, 5, 6]
    assert row.target_rows_M.tolist() == [1, 2, 3, 4]
    assert row.target_ids_M.tolist() == [12, 2, 21, 2]
    assert {a.dtype for a in (row.tokens_T, row.target_rows_M, row.layout.end_T)} == {np.dtype(np.int32)}


def test_branch_by_hand() -> None:
    row = assemble_row([piece([10, 11, 12, 2], 2), piece([10, 11, 13, 2], 2, trunk=0, shared=2)], 5, 0)
    assert row.tokens_T.tolist() == [10, 11, 12, 13, 1]
    assert row.layout.positions_T.tolist() == [0, 1, 2, 2, 0]
    assert row.layout.end_T.tolist() == [4, 4, 3, 4, 4]
    assert row.target_rows_M.tolist() == [1, 2, 1, 3]
    assert row.target_ids_M.tolist() == [12, 2, 13, 2]


def test_document_without_source_never_predicts_its_first_token() -> None:
    row = assemble_row([piece([30, 31, 2], 0)], 4, 0)
    assert row.target_rows_M.tolist() == [0, 1]
    assert row.target_ids_M.tolist() == [31, 2]


def test_branch_may_store_nothing() -> None:
    # Two candidates that differ in the last token only: the branch is one more label on an existing slot.
    row = assemble_row([piece([10, 11, 2], 1), piece([10, 11, 7], 1, trunk=0, shared=2)], 2, 0)
    assert row.tokens_T.tolist() == [10, 11]
    assert row.target_rows_M.tolist() == [0, 1, 0, 1]
    assert row.target_ids_M.tolist() == [11, 2, 11, 7]


def test_empty_row_is_all_padding() -> None:
    row = assemble_row([], 3, 0)
    assert row.layout.end_T.tolist() == [0, 1, 2]
    assert row.layout.num_targets == row.layout.num_real == 0
    assert all(not visible_slots(row, slot) for slot in range(3))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece([1, 2, 3, 4], 1), piece([5, 6, 7], 1)], "take 5 slots, the row has 4"),
        ([piece([1], 0)], "needs 2 tokens"),
        ([piece([1, 2], 2)], "needs a target"),
        ([piece([1, 2, 3], 1), piece([9, 2, 4], 1, trunk=0, shared=1)], "differ within their 1 shared"),
        ([piece([1, 2, 3], 1), piece([1, 2, 4], 1, trunk=0, shared=3)], "all tokens but its last"),
        ([piece([1, 2], 1), piece([1, 2, 4], 1, trunk=0, shared=2)], "its trunk has 1 slots"),
        ([piece([1, 2], 1, trunk=1, shared=1), piece([1, 2], 1)], "not before it"),
        ([piece([1, 2], 1, shared=1)], "without a trunk"),
        # Between trunk and branch lies a document that must not see the trunk.
        ([piece([1, 2], 1), piece([3, 4], 1), piece([1, 5], 1, trunk=0, shared=1)], "not depth first"),
        # The shorter prefix came first: its rows would see what only the longer one shares.
        (
            [piece([1, 2, 3], 1), piece([1, 9, 9], 1, 0, 1), piece([1, 2, 8], 1, 0, 2)],
            "not depth first",
        ),
    ],
)
def test_impossible_rows_are_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assemble_row(pieces, 4, 0)


def random_forest(rng: np.random.Generator, num_documents: int) -> list[Piece]:
    """Documents over a tiny alphabet, hung on one another wherever they share a prefix, depth first."""
    documents = [tuple(rng.integers(3, 5, size=rng.integers(2, 9)).tolist()) for _ in range(num_documents)]
    pieces: list[Piece] = []

    def hang(group: list[tuple[int, ...]], trunk: int, shared: int) -> None:
        first, rest = group[0], group[1:]
        index = len(pieces)
        source_length = int(rng.integers(0, len(first)))
        pieces.append(piece(list(first), source_length, trunk, shared))
        common = [0] * len(rest)
        for i, other in enumerate(rest):
            limit = min(len(first), len(other)) - 1
            while common[i] < limit and first[common[i]] == other[common[i]]:
                common[i] += 1
        # Longer shared prefixes first; what shares no more than this document's prefix hangs on its trunk.
        for length in sorted({c for c in common if c > shared}, reverse=True):
            hang([other for other, c in zip(rest, common, strict=True) if c == length], index, length)
        left = [other for other, c in zip(rest, common, strict=True) if c <= shared]
        if left:
            hang(left, trunk, shared)

    hang(documents, -1, 0)
    return pieces


def check_against_definition(pieces: list[Piece], row: Row) -> None:
    """Every document reads exactly its own tokens, at its own positions, and predicts its own targets."""
    paths: list[list[int]] = []
    start = 0
    for p in pieces:
        own = len(p.tokens) - 1 - p.shared
        prefix = paths[p.trunk][: p.shared] if p.trunk >= 0 else []
        paths.append(prefix + list(range(start, start + own)))
        start += own
    expected_pairs: list[tuple[int, int]] = []
    for p, path in zip(pieces, paths, strict=True):
        assert [row.tokens_T[slot] for slot in path] == p.tokens[:-1].tolist()
        assert [row.layout.positions_T[slot] for slot in path] == list(range(len(path)))
        for j, slot in enumerate(path):
            assert visible_slots(row, slot) == set(path[: j + 1])
        first = max(p.source_length, 1)
        expected_pairs += [(path[j - 1], int(p.tokens[j])) for j in range(first, len(p.tokens))]
    pairs = list(zip(row.target_rows_M.tolist(), row.target_ids_M.tolist(), strict=True))
    assert pairs == expected_pairs
    assert row.layout.num_targets == len(pairs)
    assert row.layout.num_real == start
    for slot in range(start, len(row.tokens_T)):
        assert not visible_slots(row, slot)
        assert row.tokens_T[slot] == 1


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_documents=st.integers(1, 12), spare=st.integers(0, 5))
def test_random_forests(seed: int, num_documents: int, spare: int) -> None:
    pieces = random_forest(np.random.default_rng(seed), num_documents)
    slots = sum(len(p.tokens) - 1 - p.shared for p in pieces)
    check_against_definition(pieces, assemble_row(pieces, slots + spare, 0))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 8)), min_size=1, max_size=9),
    spare=st.integers(0, 4),
)
def test_plain_rows(lengths: list[tuple[int, int]], spare: int) -> None:
    pieces = [
        piece(list(range(100 * n + 3, 100 * n + 3 + length)), min(source, length - 1))
        for n, (length, source) in enumerate(lengths)
    ]
    slots = sum(length - 1 for length, _ in lengths)
    check_against_definition(pieces, assemble_row(pieces, slots + spare, 0))
