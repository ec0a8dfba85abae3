"""Rows that cost alike in groups, so that ranks of a few rows can be dealt alike: packed documents enter.

All rows have about as many tokens; what differs is attention (visible pairs) and the LM head (targets). No
dealing evens out a step whose heaviest row with its three lightest costs more than four others, so the plan
sees to what meets:

    trade_alike   a heavy row gives a document for one of as many slots that costs less, in a lighter row
    even_out      what the last row lacks is taken from the lightest rows, which makes them lighter still
    group_rows    each heavy row lies with light ones: costs 9 3 5 5 | 8 4 4 6, the mean of four is 22

How much it helps depends on the model: the smaller, the more its rows differ. Costs are those of OPT-125M in
visible pairs: of all its useful FLOPs (docs/decisions.md) a slot takes 6 x hidden, a target vocabulary /
(2 x layers). The number of ranks plays no part.

Suffixes: W documents, or trees of them, R rows of a window.
"""

from bisect import bisect_left

import numpy as np

from megatron_iml.data.plan.shuffle import Int64

GROUP_ROWS = 4
PAIRS_PER_SLOT = 6 * 768
PAIRS_PER_TARGET = 50272 // (2 * 12)
# A row that costs this much more than the mean finds three light ones for company; most rows cost 0.93 to 1.
HEAVY = 1.1
# A row that lacks this part of its slots is evened out by the light company it keeps, or is it.
SMALL_PART = 32


def document_costs(slots: Int64, targets: Int64, pairs: Int64) -> Int64:
    """Useful FLOPs of documents, or of rows, in visible pairs."""
    return PAIRS_PER_SLOT * slots + PAIRS_PER_TARGET * targets + pairs


def trade_alike(slots_W: Int64, costs_W: Int64, row_W: Int64) -> Int64:
    """Let heavy rows trade documents for cheaper ones that take as many slots; return row_W.

    So no row gets fuller or emptier. The document of a row that holds no other stays: it would find none.
    """
    row_W = row_W.copy()
    costs_R = np.bincount(row_W, costs_W).astype(np.int64)
    heavy = HEAVY * costs_R.mean() if len(costs_R) else 0.0
    by_slots = np.argsort(slots_W, kind="stable")
    starts_W = np.searchsorted(slots_W[by_slots], slots_W, side="left")
    stops_W = np.searchsorted(slots_W[by_slots], slots_W, side="right")
    candidates = np.flatnonzero(costs_R > heavy)
    for row in candidates[np.argsort(-costs_R[candidates], kind="stable")].tolist():
        own = np.flatnonzero(row_W == row)
        for document in own[np.argsort(-costs_W[own], kind="stable")].tolist():
            if costs_R[row] <= heavy:
                break
            alike = by_slots[starts_W[document] : stops_W[document]]
            shed = costs_W[document] - costs_W[alike]
            heavier = np.maximum(costs_R[row] - shed, costs_R[row_W[alike]] + shed)
            best = int(heavier.argmin())
            # Never one of its own: the row would cost what it costs.
            if heavier[best] < costs_R[row]:
                other = row_W[alike[best]]
                row_W[document], row_W[alike[best]] = other, row
                costs_R[row] -= shed[best]
                costs_R[other] += shed[best]
    return row_W


def even_out(slots_W: Int64, costs_W: Int64, row_W: Int64, row_length: int) -> Int64:
    """Fill the emptiest row with the smallest documents of many others, of light ones first; return row_W.

    Best fit leaves all that is missing in the row it opened last. A step with that row cannot be dealt
    evenly; with a hundred rows that lack a few slots each it can, if those are the rows that cost least.
    """
    if not len(slots_W):
        return row_W
    filled_R = np.bincount(row_W, slots_W).astype(np.int64)
    emptiest = int(filled_R.argmin())
    by_size = np.argsort(slots_W, kind="stable")
    # The first of each row in this order is its smallest; a row's only document must not leave it.
    rows, first = np.unique(row_W[by_size], return_index=True)
    several = (np.bincount(row_W)[rows] > 1) & (rows != emptiest)
    costs_R = np.bincount(row_W, costs_W)
    given = by_size[first[several]]
    # Small documents of the lightest rows; if they do not suffice larger ones, the smallest first.
    small = slots_W[given] <= row_length // SMALL_PART
    given = given[np.lexsort((np.where(small, costs_R[row_W[given]], slots_W[given]), ~small))]
    left = row_length - filled_R[emptiest] - np.cumsum(slots_W[given])
    # As long as the giver lacks no more afterwards than the row that it gives to.
    lacks = row_length - filled_R[row_W[given]] + slots_W[given]
    moved = given[: int(np.logical_and.accumulate(lacks <= left).sum())]
    return np.where(np.isin(np.arange(len(row_W)), moved), emptiest, row_W)


def group_rows(costs_R: Int64) -> Int64:
    """Return the rows in an order in which every four from the first on cost about as much as any others.

    The rows that are left over, fewer than four, come last: those nearest the mean, which fit any company.
    """
    loose = len(costs_R) % GROUP_ROWS
    by_distance = np.argsort(np.abs(costs_R * len(costs_R) - costs_R.sum()), kind="stable")
    grouped = np.sort(by_distance[loose:])
    # The heaviest row left takes the lightest, so that ever more even ones are left, and two neighbours in
    # the order of costs that bring the four nearest the mean of what is left: what no company could even
    # out is spread over all groups after it.
    rows = grouped[np.argsort(costs_R[grouped], kind="stable")].tolist()
    costs = costs_R[rows].tolist()
    total, others = sum(costs), GROUP_ROWS - 2
    order: list[int] = []
    while rows:
        wanted = total * GROUP_ROWS / len(rows) - costs[-1] - costs[0]
        order += [rows.pop(), rows.pop(0)]
        total -= costs.pop() + costs.pop(0)
        near = bisect_left(costs, wanted / others)
        starts = range(max(near - others, 0), min(near, len(costs) - others) + 1)
        start = min(starts, key=lambda start: abs(sum(costs[start : start + others]) - wanted))
        order += rows[start : start + others]
        total -= sum(costs[start : start + others])
        del rows[start : start + others], costs[start : start + others]
    return np.concatenate((np.array(order, dtype=np.int64), by_distance[:loose]))
