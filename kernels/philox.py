"""Philox4x32-10: random bits as a pure function of a key and a coordinate, the source of every dropout mask.

A mask must be the same in forward, backward and recomputation, and under every parallel layout. So no
generator state exists: element (row, column) of plane p is kept or dropped by

    bits = philox(key, counter=(row, column // 4, p, 0))[column % 4]
    kept if and only if bits >= probability * 2^32

with global coordinates. `dropout_key` folds (seed, plan row, layer, place) into the 64-bit key. What enters:
integers and integer tensors. What leaves: a boolean keep mask.

    key = dropout_key(1234, row=7, layer=0, place="attention")
    keep_mask(key, 0.1, rows_R, columns_C, planes_P)                 # bool [P, R, C]

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), the constants of Random123.
Triton's `tl.philox` computes the same function.
"""

import hashlib
import struct
from typing import Literal

import torch
from torch import Tensor

# A place's index goes into its keys: append, or the masks of runs that have begun change.
Place = Literal["embedding", "attention", "attention_output", "feed_forward_output"]
PLACES: tuple[Place, ...] = ("embedding", "attention", "attention_output", "feed_forward_output")

# Random123's PHILOX_M4x32 and PHILOX_W32. Words are held in int64: torch hardly computes in uint32.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def dropout_key(seed: int, row: int, layer: int, place: Place) -> int:
    """Fold what identifies one mask into a 64-bit Philox key.

    Args:
        seed: the run's seed.
        row: index of the packed row in the whole run's plan; a row is trained once, so it implies the step.
        layer: global index of the layer from 0; the embedding uses -1.
        place: where in the layer.
    """
    # Little-endian and 64 bits wide on every machine; signed, since the embedding's layer is -1.
    packed = struct.pack("<qqqq", seed, row, layer, PLACES.index(place))
    # Hashed, not added: seed and row + 1 must not meet the masks of seed + 1 and row.
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def key_tensor(key: int, device: torch.device) -> Tensor:
    """The 64 bits of a key as an int64 tensor of no dimensions, which a CUDA graph can read anew."""
    # The same bits as a signed number: int64 does not take 2^63 and above.
    signed = key - 2**64 if key >= 2**63 else key
    return torch.full((), signed, dtype=torch.int64, device=device)


def philox(
    key: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        key: 64 bits, in an int or in an int64 tensor of no dimensions.
        counter: four int64 tensors, broadcastable, each element in [0, 2^32).

    Returns:
        Four int64 tensors of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, but its bits are right: mask after the shift.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_threshold(probability: float) -> int:
    """Smallest 32-bit word that is kept when a share `probability` of elements is dropped."""
    # Just below 1 the rounding would give 2^32, which no word can reach.
    return min(round(probability * 2.0**32), _LOW)


def keep_mask(
    key: int | Tensor, probability: float, rows_R: Tensor, columns_C: Tensor, planes_P: Tensor
) -> Tensor:
    """The keep mask at global coordinates.

    Args:
        key: from `dropout_key`; an int64 tensor holds the same 64 bits (`key_tensor`).
        probability: share of elements dropped, in [0, 1).
        rows_R, columns_C, planes_P: int64 coordinates; columns may be any increasing subset.

    Returns:
        bool [P, R, C].
    """
    # Reads two values of the device, and waits for them: references may, kernels draw with `keep_tile`.
    first_group = int(columns_C[0]) // 4
    groups_G = torch.arange(first_group, int(columns_C[-1]) // 4 + 1, device=columns_C.device)
    shape = (planes_P.numel(), rows_R.numel(), groups_G.numel())
    zero = groups_G.new_zeros(())
    words = philox(
        key,
        (
            rows_R[None, :, None].expand(shape),
            groups_G[None, None, :].expand(shape),
            planes_P[:, None, None].expand(shape),
            zero.expand(shape),
        ),
    )
    # One Philox call gives four words: they serve four neighbouring columns.
    bits_PRC = torch.stack(words, dim=-1).flatten(-2)
    # Unless the columns are whole groups of four without gaps, words of others were drawn with theirs.
    if columns_C.numel() != bits_PRC.shape[-1]:
        bits_PRC = bits_PRC.index_select(-1, columns_C - 4 * first_group)
    return bits_PRC >= keep_threshold(probability)
