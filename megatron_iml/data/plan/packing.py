"""Packs one window of draws into rows of whole documents; a corpus, a stream and a number enter, rows leave.

    draw    the window's stretch of the stream, documents cut or dropped: draws.py
    hang    if asked for, documents that begin alike are gathered into trees: prefixes.py
    pack    largest first, each into the row it fills best
    even    rows trade documents and lie in shuffled groups of four that cost alike: balance.py

Nothing depends on the number of data-parallel ranks.

With row_length 8, documents of 9, 5, 4 and 3 tokens take 8, 4, 3 and 2 slots: rows [9], [5 4], and the 3
opens a third row or, if the window was to have two, is not part of it.

Suffixes: N draws of the window, P packed ones in the order in which they lie, W trees (documents, where
nothing is shared), R rows, K tasks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.balance import document_costs, place_rows
from megatron_iml.data.plan.draws import Draws, DrawStream, draw_window
from megatron_iml.data.plan.folder import ENTRY
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.prefixes import hang_documents, separate_documents
from megatron_iml.data.plan.shuffle import Int64, stream_key
from megatron_iml.data.plan.writer import PackedRows

# Raise it whenever the same inputs give another plan: it is part of a plan's fingerprint.
ALGORITHM_VERSION = 6
# Documents packed together. Best fit among 16,384 fills 99.9 % of rows of 2,048; the smaller the window, the
# more evenly every stretch of the run follows the mixture.
WINDOW = 1 << 14


@dataclass(frozen=True, slots=True)
class PackingConfig:
    """What a plan is made from, besides its corpus."""

    mixture: Mixture
    row_length: int
    rows: int | None
    """Rows to fill by drawing from the mixture; None takes every document exactly once."""
    seed: int
    level: str | None = None
    """Only tasks of this generalisation level."""
    max_positions: int = 2048
    branches: int = 0
    """Documents that may hang on one with a common prefix; 0 shares none."""
    window: int = WINDOW
    """Documents packed together; where prefixes are shared, those that can meet."""

    def __post_init__(self) -> None:
        # `or 1` for None, which sets no number; it would let 0 pass.
        if min(self.rows or 1, self.row_length, self.max_positions, self.window) < 1 or self.rows == 0:
            raise ValueError(
                f"rows {self.rows}, row_length {self.row_length}, max_positions {self.max_positions}, window "
                f"{self.window}: each must be at least 1"
            )
        if self.branches < 0:
            raise ValueError(f"branches is {self.branches}, expected 0 (share no prefix) or more")
        if self.branches and self.row_length > np.iinfo(ENTRY["trunk"]).max:
            raise ValueError(
                f"row_length {self.row_length}: where prefixes are shared a plan counts up to 32767 "
                "documents of a row; use shorter rows or share none"
            )
        # A plan stores lengths in 16 bits, and numpy would wrap a longer one without a word.
        if self.limit > np.iinfo(ENTRY["length"]).max:
            raise ValueError(
                f"row_length {self.row_length} and max_positions {self.max_positions} let documents have "
                f"{self.limit} tokens; a plan holds at most 65535: lower max_positions"
            )

    @property
    def limit(self) -> int:
        """Tokens of the longest document that is kept whole."""
        # The last token is predicted and never read: it takes neither a slot nor a position.
        return min(self.row_length, self.max_positions) + 1

    def origin(self, corpus: Corpus) -> dict[str, Any]:
        """Return everything the plan follows from; its digest is the plan's fingerprint."""
        return {
            "algorithm_version": ALGORITHM_VERSION,
            "corpus_fingerprint": corpus.fingerprint,
            # Every document once follows no mixture, so none may tell two such plans apart.
            "mixture": self.mixture.as_dict() if self.rows is not None else None,
            "row_length": self.row_length,
            "max_positions": self.max_positions,
            "rows": self.rows,
            "level": self.level,
            "seed": self.seed,
            "branches": self.branches,
            "window": self.window,
        }


@dataclass(frozen=True, slots=True, eq=False)
class PackedWindow:
    """Rows of one window, and what became of the draws of every task: counts by column, int64 [K] each."""

    rows: PackedRows
    tally: dict[str, Int64]


def best_fit(slots_W: Int64, row_length: int) -> tuple[Int64, int]:
    """Assign documents to rows, longest first, each to the open row it fills best; return row_W, rows.

    Open rows are kept by the space they have left; the set of spaces in use is one integer, whose lowest bit
    at or above a length is the best fit.
    """
    # Python's integers grow: this one has a bit for each of row_length + 1 spaces.
    by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0
    rows = 0
    row_of = [0] * len(slots_W)
    # A loop over numpy's own scalars takes several times as long.
    slots = slots_W.tolist()
    # Longest first: what is left over at the end is small and fits anywhere.
    for document in np.argsort(-slots_W, kind="stable").tolist():
        need = slots[document]
        # x & -x keeps the lowest bit of x that is set.
        fitting = spaces >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = row_length, rows
            rows += 1
        row_of[document] = row
        left = space - need
        if left:
            by_space[left].append(row)
            spaces |= 1 << left
    return np.array(row_of, dtype=np.int64), rows


@dataclass(frozen=True, slots=True, eq=False)
class _Placement:
    """Which draws lie where: their order, the tree of each, the tokens it shares with the one before it, and
    the row of every tree."""

    order_P: Int64
    tree_P: Int64
    shared_P: Int64
    row_W: Int64
    num_rows: int


def _place(corpus: Corpus, draws: Draws, kept_P: Int64, config: PackingConfig) -> _Placement:
    """Give every kept draw a row."""
    lengths_P = draws.lengths.length_N[kept_P]
    forest = (
        hang_documents(_tokens(corpus, draws, kept_P), config.branches, config.row_length)
        if config.branches
        else separate_documents(len(kept_P))
    )
    slots_P = lengths_P[forest.order_P] - 1 - forest.shared_P
    row_W, num_rows = best_fit(_sum_trees(slots_P, forest.tree_P), config.row_length)
    return _Placement(kept_P[forest.order_P], forest.tree_P, forest.shared_P, row_W, num_rows)


def _place_exactly(
    corpus: Corpus, draws: Draws, kept_P: Int64, config: PackingConfig, rows: int
) -> _Placement:
    """Give a beginning of the kept draws, as many as `rows` rows hold, its rows; draws beyond get none."""
    # Best fit is not monotone, a document more may even save a row: what is found is a beginning that fits,
    # and does not with one more document, though a still longer one might.
    holds, exceeds = 0, len(kept_P)
    while exceeds - holds > 1:
        middle = (holds + exceeds) // 2
        if _place(corpus, draws, kept_P[:middle], config).num_rows <= rows:
            holds = middle
        else:
            exceeds = middle
    placed = _place(corpus, draws, kept_P[:holds], config)
    # One document more may cost two rows: then the next ones fill the missing rows by themselves.
    alone = np.arange(placed.num_rows, rows)
    return _Placement(
        np.concatenate((placed.order_P, kept_P[holds : holds + len(alone)])),
        np.concatenate((placed.tree_P, len(placed.row_W) + np.arange(len(alone)))),
        np.concatenate((placed.shared_P, np.zeros(len(alone), dtype=np.int64))),
        np.concatenate((placed.row_W, alone)),
        rows,
    )


def _spread(draws: Draws, placed: _Placement, config: PackingConfig, number: int) -> Int64:
    """Even the rows out and give each its place in the window; return the place of every draw's row [P]."""
    slots_P, targets_P, pairs_P = _measure(draws, placed.order_P, placed.shared_P)
    slots_W = _sum_trees(slots_P, placed.tree_P)
    costs_W = _sum_trees(document_costs(slots_P, targets_P, pairs_P), placed.tree_P)
    key = stream_key(config.seed, "rows", number)
    return place_rows(slots_W, costs_W, placed.row_W, config.row_length, key)[placed.tree_P]


def _sum_trees(values_P: Int64, tree_P: Int64) -> Int64:
    return np.bincount(tree_P, values_P).astype(np.int64)


def _measure(draws: Draws, order_P: Int64, shared_P: Int64) -> tuple[Int64, Int64, Int64]:
    """Return what draws bring to their rows: slots, targets and visible pairs of each."""
    # The last token takes no slot; the slot at position p sees p + 1 columns.
    last_P = draws.lengths.length_N[order_P] - 1
    # A branch stands behind the prefix that it shares, so its slots see that as well.
    pairs_P = (last_P * (last_P + 1) - shared_P * (shared_P + 1)) // 2
    return last_P - shared_P, draws.lengths.num_targets_N[order_P], pairs_P


def _tokens(corpus: Corpus, draws: Draws, kept_P: Int64) -> list[NDArray[np.uint16]]:
    cuts_N = draws.lengths.cut_N
    return [
        corpus.tokens(document, reference)[0][cut:]
        for document, reference, cut in zip(
            draws.document_N[kept_P].tolist(),
            draws.reference_N[kept_P].tolist(),
            cuts_N[kept_P].tolist(),
            strict=True,
        )
    ]


def pack_window(
    corpus: Corpus, stream: DrawStream, config: PackingConfig, number: int, rows: int | None = None
) -> PackedWindow:
    """Pack a window; if it fills more than `rows` rows, its longest beginning that fills just these."""
    draws = draw_window(corpus, stream, number)
    kept_P = np.flatnonzero(draws.lengths.kept_N)
    placed = _place(corpus, draws, kept_P, config)
    taken = len(draws.task_N)
    # Evening rows out leaves their number as it is, so this can come first.
    if rows is not None and placed.num_rows > rows:
        placed = _place_exactly(corpus, draws, kept_P, config, rows)
        # Draws after the last one packed are not part of the plan; dropped ones before it are.
        taken = int(placed.order_P.max()) + 1
    row_P = _spread(draws, placed, config, number)
    # Stable: a tree stays together, and trees of a row in the order of the stream.
    by_row = np.argsort(row_P, kind="stable")
    order_P, shared_P = placed.order_P[by_row], placed.shared_P[by_row]
    counts_R = np.bincount(row_P, minlength=placed.num_rows)
    return PackedWindow(
        _arrange(draws, order_P, shared_P, counts_R),
        _tally(draws, order_P, shared_P, taken, len(stream.tasks)),
    )


def _arrange(draws: Draws, order_P: Int64, shared_P: Int64, counts_R: Int64) -> PackedRows:
    """Turn packed draws, row after row, into entries and sums of rows."""
    lengths = draws.lengths
    length_P = lengths.length_N[order_P]
    starts_R = np.cumsum(counts_R) - counts_R
    place_P = np.arange(len(order_P)) - np.repeat(starts_R, counts_R)
    entries = np.zeros(len(order_P), dtype=ENTRY)
    entries["document"] = draws.document_N[order_P]
    entries["cut"] = lengths.cut_N[order_P]
    entries["reference"] = draws.reference_N[order_P]
    entries["length"] = length_P
    entries["shared"] = shared_P
    # Depth first, so that what a document shares with any other it shares with the one before it.
    entries["trunk"] = np.where(shared_P > 0, place_P - 1, -1)
    measures = _measure(draws, order_P, shared_P)
    return PackedRows(entries, counts_R, *(_sum_rows(values_P, starts_R) for values_P in measures))


def _sum_rows(values_P: Int64, starts_R: Int64) -> Int64:
    return np.add.reduceat(values_P, starts_R) if len(starts_R) else np.zeros(0, dtype=np.int64)


def _tally(draws: Draws, order_P: Int64, shared_P: Int64, taken: int, num_tasks: int) -> dict[str, Int64]:
    lengths = draws.lengths

    def per_task(chosen: Int64, weights: Int64 | None = None) -> Int64:
        """Count documents, or sum weights, by task."""
        return np.bincount(draws.task_N[chosen], weights, minlength=num_tasks).astype(np.int64)

    every = np.arange(taken)
    # No draw is both: what has no target is an empty text, of one token.
    no_target, too_long = lengths.no_target_N[:taken], lengths.too_long_N[:taken]
    return {
        "drawn": per_task(every),
        "packed": per_task(order_P),
        "truncated": per_task(order_P[lengths.cut_N[order_P] > 0]),
        "tokens": per_task(order_P, lengths.length_N[order_P]),
        "target_tokens": per_task(order_P, lengths.num_targets_N[order_P]),
        "shared_tokens": per_task(order_P, shared_P),
        "target_too_long": per_task(every[too_long]),
        "no_target": per_task(every[no_target]),
    }
