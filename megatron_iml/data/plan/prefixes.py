"""Gathers documents that begin alike into trees: tokens enter, an order, trees and shared lengths leave.

Sorted by their tokens, documents lie as a depth-first walk of their prefix tree meets them: each has its
longest common prefix with the one before it, and stores only what follows. With a shortest prefix of 2
instead of 32:

    a  10 11 12 13  2      a        stores 10 11 12 13       its last token is never read
    b  10 11 12 20  2      b  3     stores 20                after 10 11 12 of a
    c  10 11 12 20 21 2    c  4     stores 20's successor 21 after 10 11 12 of a and 20 of b
    d  10 11 40  2         d  2     stores 40
    e  70 71  2            e  0     a tree of its own

Nine slots instead of 19. Where a run of such documents is longer than a tree may be, or its tokens do not fit
a row, it is cut where least is lost.

Suffixes: P documents, in the order of the trees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.plan.shuffle import Int64

# Shorter ones save less than the documents' meeting in one row costs in variety.
SHORTEST_PREFIX = 32

Tokens = NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """Documents tree after tree, each depth first.

    `order_P` says which document lies where, `tree_P` its tree, counted from 0, and `shared_P` how many
    tokens it has in common with the one before it and does not store (0: it begins a tree).
    """

    order_P: Int64
    tree_P: Int64
    shared_P: Int64


def separate_documents(count: int) -> Forest:
    """Return documents that share nothing, in their own order."""
    return Forest(np.arange(count), np.arange(count), np.zeros(count, dtype=np.int64))


def hang_documents(tokens: Sequence[Tokens], branches: int, max_slots: int) -> Forest:
    """Gather documents into trees of up to 1 + `branches` of them that take up to `max_slots` slots.

    Trees come in the order of their earliest documents. A document that alone takes more slots than allowed
    is a tree by itself.
    """
    # Most significant byte first, so that bytes compare as tokens do.
    keys = [document.astype(">u2").tobytes() for document in tokens]
    order = sorted(range(len(tokens)), key=keys.__getitem__)
    shared = [0] + [
        _common_prefix(keys[one], keys[other]) for one, other in zip(order, order[1:], strict=False)
    ]
    starts = [place for place, length in enumerate(shared) if length == 0] + [len(order)]
    trees: list[list[tuple[int, int]]] = []
    for start, stop in zip(starts, starts[1:], strict=False):
        slots = [len(tokens[document]) - 1 for document in order[start:stop]]
        for first, last in _cut_run(slots, shared[start:stop], 1 + branches, max_slots):
            members = order[start + first : start + last]
            # The first of a piece stores what it had in common with a document of another piece.
            prefixes = [0, *shared[start + first + 1 : start + last]]
            trees.append(list(zip(members, prefixes, strict=True)))
    # Back from the order of tokens to that of the stream, in which trees of one size are placed.
    trees.sort(key=min)
    # An empty window has no pair that would give the array its two columns.
    flat = np.array([pair for tree in trees for pair in tree], dtype=np.int64).reshape(-1, 2)
    tree_P = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    return Forest(flat[:, 0], tree_P, flat[:, 1])


def _common_prefix(one: bytes, other: bytes) -> int:
    """Return tokens that two documents share and could read from one place; 0 where it is not worth it."""
    # No document stores its last token, so none can read it from another.
    # Two bytes a token.
    limit = min(len(one), len(other)) // 2 - 1
    # Bytes compare in one go, and most neighbours differ here already.
    if limit < SHORTEST_PREFIX or one[: 2 * SHORTEST_PREFIX] != other[: 2 * SHORTEST_PREFIX]:
        return 0
    a, b = (np.frombuffer(key, dtype=">u2", count=limit) for key in (one, other))
    differs = a != b
    return int(differs.argmax()) if differs.any() else limit


def _cut_run(slots: Sequence[int], shared: Sequence[int], most: int, max_slots: int) -> list[tuple[int, int]]:
    """Cut a run of documents into pieces [first, last) of at most `most` of them so that most stays shared.

    `shared[i]` is what document i has in common with the one before it; it is lost where i begins a piece.
    """
    saved = list(accumulate(shared))
    taken = list(accumulate(slots, initial=0))
    best, cut = [0] * (len(slots) + 1), [0] * (len(slots) + 1)
    for last in range(1, len(slots) + 1):
        # Alone, whatever it takes; then with ever more of those before it.
        best[last], cut[last] = best[last - 1], last - 1
        for first in range(last - 2, max(last - most, 0) - 1, -1):
            kept = saved[last - 1] - saved[first]
            # Another in front takes at least what the next one then shares with it: no longer piece fits.
            if taken[last] - taken[first] - kept > max_slots:
                break
            if best[first] + kept > best[last]:
                best[last], cut[last] = best[first] + kept, first
    pieces = []
    last = len(slots)
    while last:
        pieces.append((cut[last], last))
        last = cut[last]
    return pieces[::-1]
