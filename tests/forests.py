"""Random packed rows: documents, trees of documents on shared prefixes, padding anywhere between."""

import numpy as np
import torch
from torch import Tensor


def random_end(seed: int, max_slots: int = 60) -> Tensor:
    """`end_T`, int32, of a random row of 1 to about `max_slots` slots."""
    rng = np.random.default_rng(seed)
    end: list[int] = []
    goal = int(rng.integers(1, max_slots))
    while len(end) < goal:
        if rng.random() < 0.2:
            end.extend(range(len(end), len(end) + int(rng.integers(1, 4))))
        else:
            _append_tree(end, rng, depth=0)
    return torch.tensor(end, dtype=torch.int32)


def _append_tree(end: list[int], rng: np.random.Generator, depth: int) -> None:
    """A document of 1 to 9 slots; its first ones may carry branches, and those branches again."""
    first = len(end)
    length = int(rng.integers(1, 10))
    end.extend([first + length] * length)
    if depth < 3 and rng.random() < 0.5:
        # Longer prefixes first, so that every column is seen by one interval of rows.
        prefixes = sorted(rng.integers(1, length + 1, size=rng.integers(1, 4)).tolist(), reverse=True)
        for prefix in prefixes:
            _append_tree(end, rng, depth + 1)
            end[first : first + prefix] = [len(end)] * prefix
