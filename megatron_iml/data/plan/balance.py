"""Rows that cost alike in groups, so that ranks of a few rows can be dealt alike: packed documents enter.

All rows have about as many tokens; what differs is attention (visible pairs) and the LM head (targets). No
dealing evens out a step whose heaviest row with its three lightest costs more than four others, so the plan
sees to what meets:

    trade_alike   a heavy row gives a document for one of as many slots that costs less, in a lighter row
    even_out      what the last row lacks is taken from the lightest rows, which makes them lighter still
    group_rows    each heavy row lies with light ones: costs 9 3 5 5 | 8 4 4 6, the mean of four is 22
    trade_alike   a heavy group gives documents, as a heavy row did
    swap_rows     and rows, where no document of as many slots is left
    space_groups  groups with heavy rows lie apart: one of the third that has the heaviest in every three

The last is for ranks of five, six or seven rows: two ranks cannot share three groups of the kind 9 3 3 3.

How much it helps depends on the model: the smaller, the more its rows differ. Costs are those of OPT-125M in
visible pairs: of all its useful FLOPs (docs/decisions.md) a slot takes 6 x hidden, a target vocabulary /
(2 x layers). The number of ranks plays no part.

Suffixes: W documents, or trees of them, R rows of a window, G groups.
"""

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.plan.shuffle import Int64, permute, words

# Any other number below gives other plans from the same inputs: raise ALGORITHM_VERSION (packing.py).
GROUP_ROWS = 4
PAIRS_PER_SLOT = 6 * 768
PAIRS_PER_TARGET = 50272 // (2 * 12)
# A row that costs this much more than the mean finds three light ones for company; most rows cost 0.93 to 1.
HEAVY_ROW = 1.1
# Half of what the heaviest rank may be above the mean: the means of steps differ too.
HEAVY_GROUP = 1.005
# A row that lacks this part of its slots is evened out by the light company it keeps, or is it.
SMALL_PART = 32
# Of real groups less than a third has a row far above the mean.
STRATA = 3


def place_rows(slots_W: Int64, costs_W: Int64, row_W: Int64, row_length: int, key: np.uint64) -> Int64:
    """Even rows out and give each its place in the window; return the place of every document's row [W]."""
    # A window whose draws were all dropped has no row.
    num_rows = int(row_W.max(initial=-1)) + 1
    row_W = trade_alike(slots_W, costs_W, row_W, np.arange(num_rows), HEAVY_ROW)
    row_W = even_out(slots_W, costs_W, row_W, row_length)
    order_R = group_rows(_row_costs(costs_W, row_W))
    groups_GR, loose = np.split(order_R, [num_rows // GROUP_ROWS * GROUP_ROWS])
    groups_GR = groups_GR.reshape(-1, GROUP_ROWS)
    # Unset for rows that are left over: no document of theirs is asked about below.
    group_R = np.empty(num_rows, dtype=np.int64)
    group_R[groups_GR] = np.arange(len(groups_GR))[:, None]
    # Rows that are left over are no group: they would take whatever costs much.
    grouped = np.flatnonzero(~np.isin(row_W, loose))
    row_W[grouped] = trade_alike(slots_W[grouped], costs_W[grouped], row_W[grouped], group_R, HEAVY_GROUP)
    costs_R = _row_costs(costs_W, row_W)
    groups_GR = swap_rows(groups_GR, costs_R, HEAVY_GROUP)
    # By the heaviest row and not the sum: the sums of groups are as good as equal by now.
    firsts_G = GROUP_ROWS * space_groups(costs_R[groups_GR].max(axis=1, initial=0), key)
    place_R = np.arange(num_rows)
    place_R[groups_GR] = firsts_G[:, None] + np.arange(GROUP_ROWS)
    place_R[loose] = np.arange(groups_GR.size, num_rows)
    return place_R[row_W]


def _row_costs(costs_W: Int64, row_W: Int64) -> Int64:
    # Sums of weights are floats, exact up to 2^53.
    return np.bincount(row_W, costs_W).astype(np.int64)


def document_costs(slots: Int64, targets: Int64, pairs: Int64) -> Int64:
    """Useful FLOPs of documents, or of rows, in visible pairs."""
    return PAIRS_PER_SLOT * slots + PAIRS_PER_TARGET * targets + pairs


def trade_alike(slots_W: Int64, costs_W: Int64, row_W: Int64, part_R: Int64, limit: float) -> Int64:
    """Let parts above `limit` times the mean trade documents for cheaper ones of as many slots; return row_W.

    So no row gets fuller or emptier. A part is a row, or the group that part_R puts it into.
    """
    row_W = row_W.copy()
    part_W = part_R[row_W]
    costs_G = _row_costs(costs_W, part_W)
    heavy = limit * costs_G.mean() if len(costs_G) else 0.0
    by_slots = np.argsort(slots_W, kind="stable")
    starts_W = np.searchsorted(slots_W[by_slots], slots_W, side="left")
    stops_W = np.searchsorted(slots_W[by_slots], slots_W, side="right")
    cheapest_W = costs_W[np.lexsort((costs_W, slots_W))[starts_W]]
    candidates = np.flatnonzero(costs_G > heavy)
    for part in candidates[np.argsort(-costs_G[candidates], kind="stable")].tolist():
        own = np.flatnonzero(part_W == part)
        # Whatever part took its only document would be no lighter, and one that costs least of all of its
        # size is worth none of them. Where most are alike, to look would take the square of their number.
        own = own[costs_W[own] > cheapest_W[own]] if len(own) > 1 else own[:0]
        for document in own[np.argsort(-costs_W[own], kind="stable")].tolist():
            if costs_G[part] <= heavy:
                break
            alike = by_slots[starts_W[document] : stops_W[document]]
            shed = costs_W[document] - costs_W[alike]
            heavier = np.maximum(costs_G[part] - shed, costs_G[part_W[alike]] + shed)
            best = int(heavier.argmin())
            # Never one of its own: the part would cost what it costs.
            if heavier[best] < costs_G[part]:
                other = alike[best]
                costs_G[part] -= shed[best]
                costs_G[part_W[other]] += shed[best]
                for of_W in (row_W, part_W):
                    of_W[[document, other]] = of_W[[other, document]]
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


def swap_rows(rows_GK: Int64, costs_R: NDArray[np.number], limit: float) -> Int64:
    """Let the heaviest group swap the two rows that help it most; return the groups' rows [G, K].

    It ends when no group is above `limit` times the mean or when nothing helps the heaviest.
    """
    rows_GK = rows_GK.copy()
    costs_GK = costs_R[rows_GK]
    costs_G = costs_GK.sum(axis=1)
    even = limit * costs_G.mean() if len(costs_G) else 0.0
    # A swap never makes the heaviest heavier, but sums of floats might go round in a circle.
    for _ in range(rows_GK.size):
        heaviest = int(costs_G.argmax())
        if costs_G[heaviest] <= even:
            break
        # What the heaviest sheds if it gives its own row for another of some group, [own, group, other].
        shed = costs_GK[heaviest][:, None, None] - costs_GK[None]
        heavier = np.maximum(costs_G[heaviest] - shed, costs_G[None, :, None] + shed)
        own, group, other = np.unravel_index(heavier.argmin(), heavier.shape)
        if heavier[own, group, other] >= costs_G[heaviest]:
            break
        for table_GK in (rows_GK, costs_GK):
            given = table_GK[heaviest, own]
            table_GK[heaviest, own] = table_GK[group, other]
            table_GK[group, other] = given
        costs_G[[heaviest, group]] = costs_GK[[heaviest, group]].sum(axis=1)
    return rows_GK


def space_groups(heaviest_G: Int64, key: np.uint64) -> Int64:
    """Return a shuffled place for every group; of any three that follow each other one is of the heavy third.

    Unshuffled, the long documents of a window would all come in its first steps.

    Args:
        heaviest_G: cost of each group's heaviest row.
        key: names the shuffle.
    """
    groups = len(heaviest_G)
    # Stratum s takes the places s, s + 3, s + 6 and so on. Where two windows meet, two groups of the heavy
    # third may still be neighbours.
    sizes = (groups + STRATA - 1 - np.arange(STRATA)) // STRATA
    stratum_G = np.repeat(np.arange(STRATA), sizes)
    index_G = np.arange(groups) - (np.cumsum(sizes) - sizes)[stratum_G]
    place_G = np.empty(groups, dtype=np.int64)
    by_weight = np.argsort(-heaviest_G, kind="stable")
    place_G[by_weight] = STRATA * permute(index_G, sizes[stratum_G], words(key, stratum_G)) + stratum_G
    return place_G
