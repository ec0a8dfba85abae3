"""Cuts a flat range of a tensor into boxes, which have a place in the whole tensor that a checkpoint holds.

A data-parallel rank owns ranges of flattened parameters, which begin and end anywhere. A distributed
checkpoint knows boxes: an offset and a size along every axis. Elements 2 to 10 of a [4, 3] matrix are three
of them:

    . . 2          (0, 2) size (1, 1)
    3 4 5          (1, 0) size (2, 3)      the whole rows
    6 7 8
    9 . .          (3, 0) size (1, 1)
"""

import math
from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size along every axis."""


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements `start` to `stop` - 1 of a row-major tensor make up, in their order.

    At most 2 x axes - 1 of them; none is empty.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    # First row that begins inside the range, and the one after the last that ends inside it.
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    # Inside one row: no whole row lies between its ends.
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    # Counted from the row's own beginning; a row is a tensor of one axis less.
    before = index * math.prod(shape[1:])
    for offset, size in boxes_of_range(shape[1:], start - before, stop - before):
        yield (index, *offset), (1, *size)
