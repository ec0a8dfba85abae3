"""Flat ranges as boxes: every element once, in order, and no more boxes than there have to be."""

import numpy as np
import pytest

from megatron_iml.training.boxes import boxes_of_range


@pytest.mark.parametrize("shape", [(7,), (4, 3), (1, 5), (5, 1), (3, 4, 2)])
def test_every_range_of_a_tensor(shape: tuple[int, ...]) -> None:
    whole = np.arange(np.prod(shape)).reshape(shape)
    for start in range(whole.size + 1):
        for stop in range(start, whole.size + 1):
            boxes = list(boxes_of_range(shape, start, stop))
            parts = [
                whole[tuple(slice(at, at + extent) for at, extent in zip(offset, size, strict=True))]
                for offset, size in boxes
            ]
            elements = [element for part in parts for element in part.ravel()]
            assert elements == list(range(start, stop)), f"{start} to {stop}: {boxes}"
            assert len(boxes) <= 2 * len(shape) - 1 and all(part.size for part in parts)


def test_the_docstrings_example() -> None:
    expected = [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    assert list(boxes_of_range((4, 3), 2, 10)) == expected
