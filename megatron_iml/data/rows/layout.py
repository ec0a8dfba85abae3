"""Where the documents of a row lie and which slot sees which: lengths enter, positions and `end` leave.

A document of L tokens takes L - 1 slots: its last token is predicted, never read. Documents of 4 and 3 tokens
in a row of 7:

    slot            0   1   2   3   4   5   6
    positions_T     0   1   2   0   1   0   0      restart at every document; the model adds OPT's offset of 2
    end_T           3   3   3   5   5   5   6      row sees col  <=>  col <= row < end[col]; padding none

A branch stores only what follows the prefix it shares with its trunk. With a document of 4 tokens that hangs
on 2 tokens of the first one (trunk 0, shared 2), right after it:

    slot            0   1   2   3
    positions_T     0   1   2   2                  positions continue from the prefix
    end_T           4   4   3   4                  slot 3 sees 0, 1 and itself, never 2

`end_T` is the attention mask, all of it: kernels/document_attention/bounds.py reads it.

Suffixes: T row slots, N pieces (documents) of the row, P prefix slots.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


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
class Slots:
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


def allot_slots(lengths_N: Int64, shared_N: Int64, trunks_N: Int64, row_length: int) -> Slots:
    """Give every piece of a row its slots; asserts that they fit and that branches lie depth first."""
    assert (lengths_N >= 2).all(), f"a document needs 2 tokens to have a target: {lengths_N.tolist()}"
    slots_N = lengths_N - 1 - shared_N
    assert (slots_N >= 0).all() and (shared_N >= 0).all(), "a branch shares at most all tokens but its last"
    stops_N = np.cumsum(slots_N)
    starts_N = stops_N - slots_N
    num_real = int(stops_N[-1]) if len(stops_N) else 0
    assert num_real <= row_length, f"{len(slots_N)} documents take {num_real} slots, the row has {row_length}"

    # 0 for padding too: the position table has a row for it, and nobody sees what it gives.
    positions_T = np.zeros(row_length, dtype=np.int32)
    # Padding first: end[col] = col hides a column even from itself.
    end_T = np.arange(row_length, dtype=np.int32)
    # Slot minus start counts from 0; a branch counts on from the tokens it shares.
    positions_T[:num_real] = np.arange(num_real) - np.repeat(starts_N - shared_N, slots_N)
    end_T[:num_real] = np.repeat(stops_N, slots_N)
    prefixes = _extend_trunks(starts_N, stops_N, shared_N, trunks_N, end_T)
    return Slots(starts_N, stops_N, positions_T, end_T, prefixes)


def _extend_trunks(
    starts_N: Int64, stops_N: Int64, shared_N: Int64, trunks_N: Int64, end_T: Int32
) -> dict[int, Int64]:
    """Stretch `end_T` of every branch's prefix over the branch, in place; return those prefix slots [P]."""
    assert (shared_N[trunks_N < 0] == 0).all(), "a piece without a trunk shares nothing"
    all_slots = np.arange(len(end_T))
    prefixes: dict[int, Int64] = {}
    paths: dict[int, Int64] = {}  # of trunks: prefix and own slots, in the order of their tokens
    # In the order of the row: a trunk that is a branch itself has its prefix by then.
    for branch in np.flatnonzero(trunks_N >= 0).tolist():
        trunk, shared, start = int(trunks_N[branch]), int(shared_N[branch]), int(starts_N[branch])
        assert trunk < branch, f"piece {branch} hangs on piece {trunk}, which is not before it"
        if trunk not in paths:
            own = all_slots[starts_N[trunk] : stops_N[trunk]]
            paths[trunk] = np.concatenate((prefixes[trunk], own)) if trunk in prefixes else own
        # A path is one slot a token, so the first `shared` slots are those of the shared tokens.
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
