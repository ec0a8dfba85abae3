"""Dropout that depends on nothing but the run's seed and global coordinates.

The mask of an element is a pure function (Philox, `kernels/philox.py`) of a key and the element's place in
the row; the key is one of (seed, plan row, layer, place). The same under every parallel layout and under
recomputation, with no generator state to keep. Keys of a row lie in one small tensor on the device, so that
kernels read them there:

    keys_LP = plan.keys(row=7, layers=range(0, 12), device)     # int64 [1 + 12, 4]
    keys_LP[0, 0]                                               # the embedding's
    keys_LP[1 + i]                                              # of layer i of the range
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iml.kernels.philox import PLACES, Place, dropout_key

EMBEDDING_LAYER = -1
"""The embedding's place in keys, before layer 0."""


@dataclass(frozen=True)
class DropoutPlan:
    """Probabilities and the root of all masks."""

    seed: int
    hidden: float
    attention: float
    embedding: float

    @property
    def drops(self) -> bool:
        """Whether any mask is needed at all."""
        return max(self.hidden, self.attention, self.embedding) > 0.0

    def keys(self, row: int, layers: Sequence[int], device: torch.device) -> Tensor:
        """Keys of the embedding and of the given layers (global indices): int64 [1 + layers, places]."""
        keys = [
            [dropout_key(self.seed, row, layer, place) for place in PLACES]
            for layer in (EMBEDDING_LAYER, *layers)
        ]
        # 64 bits, unsigned in Python, signed in torch.
        signed = [[key - 2**64 if key >= 2**63 else key for key in row_of_keys] for row_of_keys in keys]
        return torch.tensor(signed, dtype=torch.int64).to(device, non_blocking=True)


def key_of(keys_LP: Tensor, layer: int, place: Place) -> Tensor:
    """One key as an int64 tensor of no dimensions; `layer` counts from 0 in the range, -1 is the
    embedding."""
    # A view, for kernels to read on the device; a number would make the host wait for it.
    return keys_LP[layer + 1, PLACES.index(place)]
