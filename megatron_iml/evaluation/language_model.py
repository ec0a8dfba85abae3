"""The narrow interface through which evaluation sees a model: three verbs, greedy, numpy in and out.

What enters: packed rows (ranking) and prompts (generation). What leaves: negative log-likelihoods and greedy
token ids. The real model implements it in `model/inference.py`; tests implement it in a few lines of numpy.

    row with 5 targets             --target_losses--> [0.1, 2.3, 0.7, 1.9, 0.2]
    prompts [[713, 16], [8275]]    --prefill-->        cache, [10, 2]     (2 = </s>: the second is finished)
    cache.keep([0])                                   the cache now holds the first sequence only
    [10]                           --decode-->        [7]

Shape letters: M = targets of a row, B = sequences decoded together, L = tokens of one prompt.
Under model parallelism every rank of one model makes the same calls and receives the same arrays.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.rows.assemble import Row


class KeyValueCache(Protocol):
    """Keys and values of B sequences in decoding; opaque but for dropping the finished ones."""

    # Positional, so that an implementation may name its argument as it likes.
    def keep(self, indices_K: NDArray[np.int64], /) -> None:
        """Keep only these sequences: increasing indices into the present batch."""
        ...


# A model gets back the cache that it made: one type variable ties prefill to decode.
CacheT = TypeVar("CacheT", bound=KeyValueCache)


class LanguageModel(Protocol[CacheT]):
    """What ranking and generation ask of a model."""

    def target_losses(self, row: Row) -> np.ndarray:
        """Negative log-likelihoods, fp32 [M], natural logarithm, in the order of the row's targets."""
        ...

    def prefill(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> tuple[CacheT, np.ndarray]:
        """Read prompts (int32 [L] each, L >= 1) and return the cache and the greedy next ids [B].

        The cache has room for `max_new_tokens` beside each prompt; together they fit the model's positions.
        Argmax runs over the tokenizer's entries only, never over the padding rows of the embedding.
        """
        ...

    def decode(self, cache: CacheT, tokens_B: np.ndarray) -> np.ndarray:
        """Append one token to each sequence of the cache and return the greedy next ids [B]."""
        ...
