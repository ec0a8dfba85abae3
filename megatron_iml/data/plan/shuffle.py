"""Random words and permutations as functions of a key and an index: nothing is drawn in turn or kept.

So any stretch of a walk over 18 million documents is computed by itself, in memory that does not grow with
their number, by any process.

    words(key, [0, 1, 2])              words 0, 1 and 2 of the key's stream
    permute([0, 1, 2, 3, 4], 5, key)   -> [3 0 4 1 2], say: every place below 5 once

Words are SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), whose
word number i is a hash of key + i x GAMMA. A permutation of n is a Feistel network on a rectangle of about
sqrt(n) x sqrt(n) places (Black, Rogaway, "Ciphers with arbitrary finite domains", 2002): a place beyond n is
sent through again until it falls below.

Suffixes: N elements, each with its own key, index and size.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

GAMMA = 0x9E3779B97F4A7C15
# Four make a network pseudorandom; sizes of two or three places have few words to mix and take more.
ROUNDS = 8


def stream_key(*parts: int | str) -> np.uint64:
    """Return the key of the stream that these parts name; other parts, another stream."""
    return np.uint64(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little"))


def words(key_N: UInt64 | np.uint64, index_N: NDArray[np.integer]) -> UInt64:
    """Return word `index` of the stream of `key`, for each pair, uint64 [N]."""
    # Arrays of unsigned numbers wrap without a warning, which is what the generator asks for.
    mixed_N = key_N + (index_N.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed_N ^ (mixed_N >> np.uint64(31))


def fractions(key_N: UInt64 | np.uint64, index_N: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return numbers evenly spread over [0, 1), one per pair of key and index, float64 [N]."""
    # 53 bits are what a float holds: the quotient stays below 1.
    return (words(key_N, index_N) >> np.uint64(11)) / 2.0**53


def permute(place_N: NDArray[np.integer], size_N: NDArray[np.integer], key_N: UInt64 | np.uint64) -> Int64:
    """Return where each place below its size goes in the permutation of its key, int64 [N]."""
    size_N, key_N = (np.broadcast_to(values, place_N.shape).astype(np.uint64) for values in (size_N, key_N))
    result_N = place_N.astype(np.uint64)
    pending = np.arange(len(result_N))
    while len(pending):
        moved = _feistel(result_N[pending], size_N[pending], key_N[pending])
        result_N[pending] = moved
        # Some 1 in sqrt(size) lands in the part of the rectangle that is no place.
        pending = pending[moved >= size_N[pending]]
    return result_N.astype(np.int64)


def _feistel(place_N: UInt64, size_N: UInt64, key_N: UInt64) -> UInt64:
    """One pass over the rectangle that holds `size` places, a bijection of all its places."""
    height_N = np.ceil(np.sqrt(size_N)).astype(np.uint64)
    width_N = (size_N + height_N - np.uint64(1)) // height_N
    row_N, column_N = np.divmod(place_N, width_N)
    for number in range(ROUNDS):
        # Each half is moved by an amount that only the other half decides, so the step can be undone.
        round_key_N = key_N ^ np.uint64(number + 1)
        if number % 2 == 0:
            row_N = _rotate(row_N, height_N, words(round_key_N, column_N))
        else:
            column_N = _rotate(column_N, width_N, words(round_key_N, row_N))
    return row_N * width_N + column_N


def _rotate(value_N: UInt64, size_N: UInt64, word_N: UInt64) -> UInt64:
    # The high half of a word, scaled to [0, size): a division by every element's own size costs far more.
    moved_N = value_N + (((word_N >> np.uint64(32)) * size_N) >> np.uint64(32))
    return np.where(moved_N >= size_N, moved_N - size_N, moved_N)
