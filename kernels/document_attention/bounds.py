"""Who sees whom in a packed row, as one int32 per token.

`end_T[col]` is one past the last row that may see column `col`: row sees col if and only if
`col <= row < end_T[col]`. For plain documents `end` is one past the document's last slot; for padding
`end_T[col] = col`, so that nobody sees it and it sees nobody. Documents that share a prefix lie depth first,
trunk before branches, and `end` is one past the last descendant:

    two documents of 3 and 2 slots, then padding       end_T = [3, 3, 3, 5, 5, 5]
    a trunk of 2 slots with branches of 2 and 1        end_T = [5, 5, 4, 4, 5]

`start_T[row]`, the first column a row may see, follows from `end` and only bounds loops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentBounds:
    """Bounds of one row on one device: `end_T` decides, `start_T` only saves work. Both int32 [tokens]."""

    end_T: Tensor
    start_T: Tensor

    @classmethod
    def from_end(cls, end_T: Tensor) -> "DocumentBounds":
        """Derive the loop bound: the first column whose `end` lies beyond the row.

        A row that sees nothing gets its own index. Intervals [col, end[col]) are nested or disjoint, so a
        row's first visible column is the first column of the tree it lies in: the latest col such that every
        earlier end is at or below it.
        """
        tokens = end_T.numel()
        index_T = torch.arange(tokens, device=end_T.device, dtype=end_T.dtype)
        reach_T = torch.cummax(end_T, dim=0).values
        previous_reach_T = torch.cat([reach_T.new_zeros(1), reach_T[:-1]])
        starts_here_T = torch.where(previous_reach_T <= index_T, index_T, torch.zeros_like(index_T))
        return cls(end_T=end_T, start_T=torch.cummax(starts_here_T, dim=0).values)
