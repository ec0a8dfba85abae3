"""Rows of packed documents, ready for a model: pieces enter, one `Row` leaves.

Of a document's tokens the last is predicted, never read, and the first is never a target. Two documents,
[10 11 | 12 2] (source length 2) and [20 | 21 2] (source length 1), in a row of 7; positions and `end` are
those of `layout.py`:

    slot            0   1   2   3   4   5   6
    tokens_T       10  11  12  20  21   1   1      padding is token 1
    target_rows_M       1   2   3   4              slot 1 predicts 12, slot 2 predicts 2, ...
    target_ids_M       12   2  21   2

With [10 11 | 13 2] hung on the first document (trunk 0, shared 2) and placed right after it:

    slot            0   1   2   3
    tokens_T       10  11  12  13
    target_rows_M   1   2   1   3                  slot 1 has two next tokens, so it occurs twice
    target_ids_M   12   2  13   2

Suffixes: T row slots, M targets, N pieces (documents) of the row, L tokens of one document.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.rows.layout import Int32, Int64, RowLayout, Slots, allot_slots

PAD_ID = 1


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


def _plain_targets(slots: Slots, firsts_N: Int64, joined: NDArray[np.integer]) -> tuple[Int32, Int32]:
    """Return targets of a row without branches; `joined` holds all tokens, the unread last ones included."""
    slots_N = slots.stops_N - slots.starts_N
    # Slot s of piece n has its next token at s + n + 1 of `joined`: n unread tokens lie before it.
    # The slot at position p holds token p and predicts token p + 1.
    is_target = slots.positions_T[: slots.num_real] >= np.repeat(firsts_N - 1, slots_N)
    rows_M = np.flatnonzero(is_target)
    piece_M = np.repeat(np.arange(len(slots_N)), slots_N)[rows_M]
    return rows_M.astype(np.int32), joined[rows_M + piece_M + 1].astype(np.int32)


def _tree_targets(slots: Slots, firsts_N: Int64, pieces: Sequence[Piece]) -> tuple[Int32, Int32]:
    """Return targets of a row with branches, document by document: shared targets count once per document."""
    all_slots = np.arange(slots.num_real)
    rows, ids = [], []
    for n, (piece, first) in enumerate(zip(pieces, firsts_N.tolist(), strict=True)):
        # Token j is predicted by the slot of token j - 1, which may lie in the prefix.
        if n in slots.prefixes:
            # Nothing where the source reaches the end of the prefix or beyond.
            rows.append(slots.prefixes[n][first - 1 :])
        # Of its own slots all predict, unless the source goes on in them.
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
    slots = allot_slots(lengths_N, shared_N, trunks_N, row_length)
    firsts_N = _integers((max(piece.source_length, 1) for piece in pieces), count)
    # Without a target a document would only cost: the plan drops such ones.
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
