"""Dropout that depends on nothing but the run's seed and global coordinates.

The mask of an element is a pure function (Philox, `kernels/philox.py`) of the seed, the plan's row, the
layer, the place and the element's global (row, feature): the same under every parallel layout and under
recomputation, with no generator state to keep. T slots here (a slice of the row under sequence parallelism),
H features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iml.kernels.philox import Place, dropout_key, keep_mask


@dataclass(frozen=True)
class DropoutPlan:
    """What every module needs to draw its masks."""

    seed: int
    hidden: float
    attention: float
    embedding: float

    def key(self, row: int, layer: int, place: Place) -> int:
        """The Philox key of one mask."""
        return dropout_key(self.seed, row, layer, place)


def dropout(hidden_T1H: Tensor, probability: float, key: int, first_slot: int) -> Tensor:
    """Zero elements with the given probability and scale the rest by 1 / (1 - probability).

    Args:
        hidden_T1H: [slots, 1, features].
        probability: 0 returns the input itself.
        key: Philox key of this mask.
        first_slot: global index in the row of the first slot here.
    """
    if probability == 0.0:
        return hidden_T1H
    slots, _, features = hidden_T1H.shape
    device = hidden_T1H.device
    rows_T = torch.arange(first_slot, first_slot + slots, device=device)
    columns_H = torch.arange(features, device=device)
    keep_TH = keep_mask(
        key, probability, rows_T, columns_H, torch.zeros(1, dtype=torch.int64, device=device)
    )[0]
    return hidden_T1H * keep_TH[:, None, :] / (1.0 - probability)
