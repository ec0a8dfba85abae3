"""Keys and values of the tokens read so far, for generation.

Prompts are read together, packed in one row; each layer then `fill`s the cache with the row's keys and
values, cut into documents. After that every step reads one token per sequence:

    prompts of 3 and 5 tokens, room for 256 more    ->   keys [2 sequences, 261 positions, heads, head size]

B sequences, P positions, N heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class KeyValueCache:
    """Per layer keys and values of B sequences; `lengths_B` counts the positions that are filled."""

    starts: list[int]
    """First slot of each prompt in the row they are read from."""
    lengths_B: Tensor
    """int64 [B], on the model's device."""
    capacity: int
    """Positions a sequence may reach."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def fill(self, layer: int, qkv_TN3D: Tensor) -> None:
        """Take over the keys and values of the prompts' row."""
        _, heads, _, head_dim = qkv_TN3D.shape
        # [B, P, N, D]: room for every new token, so that decoding allocates nothing.
        shape = (len(self.starts), self.capacity, heads, head_dim)
        # Zeros, not empty: a masked NaN would still poison the weighted sum.
        self.keys[layer], self.values[layer] = qkv_TN3D.new_zeros(shape), qkv_TN3D.new_zeros(shape)
        for sequence, (start, length) in enumerate(zip(self.starts, self.lengths_B.tolist(), strict=True)):
            self.keys[layer][sequence, :length] = qkv_TN3D[start : start + length, :, 1]
            self.values[layer][sequence, :length] = qkv_TN3D[start : start + length, :, 2]

    def attend(self, layer: int, qkv_BN3D: Tensor) -> Tensor:
        """Append one token per sequence and attend to everything before it; returns [B, N, D]."""
        q_BND, k_BND, v_BND = qkv_BN3D.unbind(2)
        sequences_B = torch.arange(q_BND.shape[0], device=q_BND.device)
        self.keys[layer][sequences_B, self.lengths_B] = k_BND
        self.values[layer][sequences_B, self.lengths_B] = v_BND
        # `<=`: the token appended above sees itself. Unfilled positions hold zeros and are masked.
        seen_BP = torch.arange(self.capacity, device=q_BND.device) <= self.lengths_B[:, None]
        # [B, N, 1, D] against [B, N, P, D]; scaled as in the layer, by 1 over the root of the head size.
        return torch.nn.functional.scaled_dot_product_attention(
            q_BND[:, :, None],
            self.keys[layer].transpose(1, 2),
            self.values[layer].transpose(1, 2),
            attn_mask=seen_BP[:, None, None],
        )[:, :, 0]

    def advance(self) -> None:
        """Count the token that every layer has just appended."""
        self.lengths_B = self.lengths_B + 1

    def keep(self, indices: Sequence[int] | NDArray[np.int64]) -> None:
        """Drop the sequences that are finished; `indices` are those that stay, increasing."""
        # `starts` stays as it was: only `fill` reads it, and that is over.
        sequences = torch.as_tensor(indices, device=self.lengths_B.device)
        self.lengths_B = self.lengths_B[sequences]
        self.keys = {layer: keys[sequences] for layer, keys in self.keys.items()}
        self.values = {layer: values[sequences] for layer, values in self.values.items()}


@dataclass(frozen=True)
class DecodeContext:
    """In place of a RowContext while decoding: every slot is the next token of one cached sequence."""

    cache: KeyValueCache
