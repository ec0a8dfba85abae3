"""Rows of packed documents, ready for a model: pieces or plan entries enter, one `Row` leaves.

A document of L tokens takes L - 1 slots: its last token is predicted, never read, and its first is never a
target. Two documents, [10 11 | 12 2] (source length 2) and [20 | 21 2] (source length 1), in a row of 7:

    slot            0   1   2   3   4   5   6
    tokens_T       10  11  12  20  21   1   1      padding is token 1
    positions_T     0   1   2   0   1   0   0      the model adds OPT's offset of 2
    end_T           3   3   3   5   5   5   6      row sees col  <=>  col <= row < end[col]; padding none
    target_rows_M       1   2   3   4              slot 1 predicts 12, slot 2 predicts 2, ...
    target_ids_M       12   2  21   2

A branch stores only what follows the prefix it shares with its trunk. With [10 11 | 13 2] hung on the first
document (trunk 0, shared 2) and placed right after it:

    slot            0   1   2   3
    tokens_T       10  11  12  13
    positions_T     0   1   2   2                  positions continue from the prefix
    end_T           4   4   3   4                  slot 3 sees 0, 1 and itself, never 2
    target_rows_M   1   2   1   3                  slot 1 has two next tokens, so it occurs twice
    target_ids_M   12   2  13   2

Suffixes: T row slots, M targets, N pieces (documents) of the row, L tokens of one document, P prefix slots.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus import Corpus
from megatron_iml.data.plan import Plan

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

PAD_ID = 1


@dataclass(frozen=True, slots=True, eq=False)
class RowLayout:
    """Where documents lie in a row: all that attention, positions and FLOP counts need, no tokens.

    `positions_T` and `end_T` are int32 [row_length]; `num_targets` counts (row, id) pairs; `num_real` slots
    hold a document's token, the rest is padding.
    """

    index: int
    positions_T: Int32
    end_T: Int32
    num_targets: int
    num_real: int


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A layout, its tokens [row_length] and targets: slot `target_rows_M[i]` predicts `target_ids_M[i]`."""

    layout: RowLayout
    tokens_T: Int32
    target_rows_M: Int32
    target_ids_M: Int32


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One document to place: its tokens [L], how many of them are source (0: all but the first are targets).

    A branch names the index of its `trunk` among the pieces of the row and how many tokens they share.
    """

    tokens: NDArray[np.integer]
    source_length: int
    trunk: int = -1
    shared: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """Slots of every piece of a row: own ones [start, stop), for branches also those of their prefix."""

    starts_N: Int64
    stops_N: Int64
    positions_T: Int32
    end_T: Int32
    prefixes: dict[int, Int64]

    @property
    def num_real(self) -> int:
        """Slots that hold tokens; the rest is padding."""
        return int(self.stops_N[-1]) if len(self.stops_N) else 0

    def layout(self, index: int, num_targets: int) -> RowLayout:
        """The row as every stage needs it."""
        return RowLayout(index, self.positions_T, self.end_T, num_targets, self.num_real)


def _allot_slots(lengths_N: Int64, shared_N: Int64, trunks_N: Int64, row_length: int) -> _Slots:
    assert (lengths_N >= 2).all(), f"a document needs 2 tokens to have a target: {lengths_N.tolist()}"
    slots_N = lengths_N - 1 - shared_N
    assert (slots_N >= 0).all() and (shared_N >= 0).all(), "a branch shares at most all tokens but its last"
    stops_N = np.cumsum(slots_N)
    starts_N = stops_N - slots_N
    num_real = int(stops_N[-1]) if len(stops_N) else 0
    assert num_real <= row_length, f"{len(slots_N)} documents take {num_real} slots, the row has {row_length}"

    positions_T = np.zeros(row_length, dtype=np.int32)
    # Padding first: end[col] = col hides a column even from itself.
    end_T = np.arange(row_length, dtype=np.int32)
    positions_T[:num_real] = np.arange(num_real) - np.repeat(starts_N - shared_N, slots_N)
    end_T[:num_real] = np.repeat(stops_N, slots_N)
    prefixes = _extend_trunks(starts_N, stops_N, shared_N, trunks_N, end_T)
    return _Slots(starts_N, stops_N, positions_T, end_T, prefixes)


def _extend_trunks(
    starts_N: Int64, stops_N: Int64, shared_N: Int64, trunks_N: Int64, end_T: Int32
) -> dict[int, Int64]:
    """Stretch `end_T` of every branch's prefix over the branch, in place; return those prefix slots [P]."""
    assert (shared_N[trunks_N < 0] == 0).all(), "a piece without a trunk shares nothing"
    all_slots = np.arange(len(end_T))
    prefixes: dict[int, Int64] = {}
    paths: dict[int, Int64] = {}  # of trunks: prefix and own slots, in the order of their tokens
    for branch in np.flatnonzero(trunks_N >= 0).tolist():
        trunk, shared, start = int(trunks_N[branch]), int(shared_N[branch]), int(starts_N[branch])
        assert trunk < branch, f"piece {branch} hangs on piece {trunk}, which is not before it"
        if trunk not in paths:
            own = all_slots[starts_N[trunk] : stops_N[trunk]]
            paths[trunk] = np.concatenate((prefixes[trunk], own)) if trunk in prefixes else own
        prefix_P = paths[trunk][:shared]
        assert len(prefix_P) == shared > 0, (
            f"piece {branch} shares {shared}, its trunk has {len(prefix_P)} slots"
        )
        # Every slot of the prefix must be seen up to here and no further: else a document that is no
        # descendant lies in between. Along a path ends never grow, so the last slot speaks for all.
        assert end_T[prefix_P[-1]] == start, (
            f"piece {branch} (trunk {trunk}, shared {shared}) is not depth first, longest prefix first"
        )
        end_T[prefix_P] = stops_N[branch]
        prefixes[branch] = prefix_P
    return prefixes


def _plain_targets(slots: _Slots, firsts_N: Int64, joined: NDArray[np.integer]) -> tuple[Int32, Int32]:
    """Return targets of a row without branches; `joined` holds all tokens, the unread last ones included."""
    slots_N = slots.stops_N - slots.starts_N
    # Slot s of piece n has its next token at s + n + 1 of `joined`: n unread tokens lie before it.
    is_target = slots.positions_T[: slots.num_real] >= np.repeat(firsts_N - 1, slots_N)
    rows_M = np.flatnonzero(is_target)
    piece_M = np.repeat(np.arange(len(slots_N)), slots_N)[rows_M]
    return rows_M.astype(np.int32), joined[rows_M + piece_M + 1].astype(np.int32)


def _tree_targets(slots: _Slots, firsts_N: Int64, pieces: Sequence[Piece]) -> tuple[Int32, Int32]:
    """Return targets of a row with branches, document by document: shared targets count once per document."""
    all_slots = np.arange(slots.num_real)
    rows, ids = [], []
    for n, (piece, first) in enumerate(zip(pieces, firsts_N.tolist(), strict=True)):
        # Token j is predicted by the slot of token j - 1, which may lie in the prefix.
        if n in slots.prefixes:
            rows.append(slots.prefixes[n][first - 1 :])
        own_start = slots.starts_N[n] + max(first - 1 - piece.shared, 0)
        rows.append(all_slots[own_start : slots.stops_N[n]])
        ids.append(piece.tokens[first:])
    return np.concatenate(rows).astype(np.int32), np.concatenate(ids).astype(np.int32)


def _integers(values: Iterable[int], count: int) -> Int64:
    return np.fromiter(values, dtype=np.int64, count=count)


def assemble_row(pieces: Sequence[Piece], row_length: int, index: int) -> Row:
    """Place documents one after another and say what every slot sees and predicts.

    Pieces lie in the given order; branches must follow their trunk depth first, those with the longer shared
    prefix first: the only order in which one interval per column describes what is seen. `index` is the row's
    number in its plan. Asserts that the row holds them, that order, and that shared tokens are equal.
    """
    count = len(pieces)
    lengths_N = _integers((len(piece.tokens) for piece in pieces), count)
    shared_N = _integers((piece.shared for piece in pieces), count)
    trunks_N = _integers((piece.trunk for piece in pieces), count)
    slots = _allot_slots(lengths_N, shared_N, trunks_N, row_length)
    firsts_N = _integers((max(piece.source_length, 1) for piece in pieces), count)
    assert (firsts_N < lengths_N).all(), "a document needs a target after its source"

    # OPT's own padding id; its embedding is never used, since padding sees and is seen by nobody.
    tokens_T = np.full(row_length, PAD_ID, dtype=np.int32)
    if not count:
        empty = np.empty(0, dtype=np.int32)
        return Row(slots.layout(index, 0), tokens_T, empty, empty)
    # Rows without branches, all of training's, take the path without a Python loop over documents.
    if slots.prefixes:
        for branch in slots.prefixes:
            piece, trunk = pieces[branch], pieces[pieces[branch].trunk]
            assert np.array_equal(piece.tokens[: piece.shared], trunk.tokens[: piece.shared]), (
                f"piece {branch} and its trunk {piece.trunk} differ within their {piece.shared} shared tokens"
            )
        tokens_T[: slots.num_real] = np.concatenate([piece.tokens[piece.shared : -1] for piece in pieces])
        rows_M, ids_M = _tree_targets(slots, firsts_N, pieces)
    else:
        joined = np.concatenate([piece.tokens for piece in pieces])
        tokens_T[: slots.num_real] = np.delete(joined, np.cumsum(lengths_N) - 1)
        rows_M, ids_M = _plain_targets(slots, firsts_N, joined)
    return Row(slots.layout(index, len(rows_M)), tokens_T, rows_M, ids_M)


class Loader:
    """Turns rows of a plan into `Row`s; its whole state is which row is asked for."""

    def __init__(self, corpus: Corpus, plan: Plan) -> None:
        """Pair a plan with its corpus. Raises ValueError when the plan was made from another one."""
        if plan.corpus_fingerprint != corpus.fingerprint:
            raise ValueError(
                f"plan {plan.folder} was made from corpus {plan.corpus_fingerprint}, but {corpus.folder} is "
                f"{corpus.fingerprint}; rebuild the plan with tools/preprocess/build_plan.py"
            )
        self.corpus = corpus
        self.plan = plan

    def layout(self, row: int) -> RowLayout:
        """Return where documents lie in a row; reads the plan only, no tokens."""
        entries = self.plan.entries(row)
        lengths_N, shared_N, trunks_N = (
            entries[name].astype(np.int64) for name in ("length", "shared", "trunk")
        )
        slots = _allot_slots(lengths_N, shared_N, trunks_N, self.plan.row_length)
        return slots.layout(row, int(self.plan.targets_R[row]))

    def row(self, row: int) -> Row:
        """Return a row with its tokens and targets."""
        pieces = []
        for document, cut, reference, length, shared, trunk in self.plan.entries(row).tolist():
            tokens, source_length = self.corpus.tokens(document, reference)
            assert len(tokens) - cut == length, (
                f"document {document}: {len(tokens)} - {cut} tokens, plan {length}"
            )
            pieces.append(Piece(tokens[cut:], source_length - cut, trunk, shared))
        assembled = assemble_row(pieces, self.plan.row_length, row)
        expected = int(self.plan.targets_R[row])
        # The loss is divided by the plan's number: one target more would pass unnoticed.
        found = assembled.layout.num_targets
        assert found == expected, f"row {row} has {found} targets, the plan says {expected}"
        return assembled

    def document_ids(self, row: int) -> NDArray[np.int64]:
        """Return the documents of a row in the order in which they lie."""
        return self.plan.entries(row)["document"].astype(np.int64)
