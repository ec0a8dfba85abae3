"""Texts as hashes of their n-grams of words, thousands of texts at a time.

What enters: texts. What leaves: 64 bits for every run of n words, and which text it is from.

    "The cat sat. The cat!", n = 2  ->  the·cat, cat·sat, sat·the, the·cat: four hashes, first = last

Words are runs of letters, digits and underscores in lower case, so that neither punctuation nor blanks hide
that two benchmarks render one sentence: the tokens of nltk's `RegexpTokenizer(r"\\w+")`, whose guard against
slow patterns would take half the time of all this. Two different runs of words have one hash with probability
2^-64: among 10^8 n-grams of evaluation and 10^10 of training, 5 % for a single false match.

Suffixes: W words of all texts, G n-grams of all texts.
"""

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Any odd number with random bits; it orders the words of an n-gram.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
WORD = re.compile(r"\w+")
# Words remembered with their hashes: some 100 MB.
LARGEST_MEMORY = 1 << 20


class _WordHashes(dict[str, int]):
    """64 bits for every word, worked out when it is first asked for."""

    def __missing__(self, word: str) -> int:
        if len(self) >= LARGEST_MEMORY:
            # All at once: the frequent words are back after a few texts.
            self.clear()
        self[word] = value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


class NgramHasher:
    """Hashes the n-grams of texts; the same text gives the same hashes in every process."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"n-grams of {n} words; give 1 or more")
        self.n = n
        self._word_hashes = _WordHashes()

    def words(self, text: str) -> list[str]:
        """The words of a text as they are compared."""
        return WORD.findall(text.lower())

    def hashes(self, texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
        """Hashes of all n-grams in their order, uint64 [G], and the number of each one's text, int64 [G]."""
        words = [self.words(text) for text in texts]
        known = self._word_hashes
        text_W = np.repeat(np.arange(len(texts)), [len(one) for one in words])
        hash_W = np.array([known[word] for one in words for word in one], dtype=np.uint64)
        starts = len(hash_W) - self.n + 1
        if starts <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        hash_G = np.zeros(starts, dtype=np.uint64)
        for k in range(self.n):
            hash_G = hash_G * MULTIPLIER + hash_W[k : k + starts]
        # The last multiplication leaves the low bits weak; a mixed hash may be cut anywhere.
        hash_G ^= hash_G >> np.uint64(29)
        hash_G *= MULTIPLIER
        hash_G ^= hash_G >> np.uint64(32)
        # Over all texts at once; n-grams whose ends are of two texts fall out here.
        inside = text_W[:starts] == text_W[self.n - 1 :]
        return hash_G[inside], text_W[:starts][inside]
