"""Token ids of a prompt, with the inference prefix in front and the left cut off where it does not fit.

What enters: prompt ids, the prefix of the checkpoint, the positions the model has and the tokens the answer
needs. What leaves: ids that fit and how many were cut. Both ranking and generation come through here.

    4 positions hold documents of 5 tokens: the last token is predicted, never read.
    prompt [11, 12, 13, 14], prefix [2], answer 2 tokens, 4 positions -> ([2, 13, 14], 2 cut)

The prefix is never cut: it is what the model expects first.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

InferencePrefix = Literal["none", "eos"]


@dataclass(frozen=True, slots=True)
class PromptRules:
    """How prompts begin, and the longest document the model (and the row) can hold, in positions."""

    prefix: tuple[int, ...]
    max_positions: int


def prompt_rules(inference_prefix: InferencePrefix, eos_id: int, max_positions: int) -> PromptRules:
    """Rules of a checkpoint: base OPT wants `</s>` first, models tuned here want nothing."""
    # OPT's own tokenizer puts </s> (id 2) first, in the place of a BOS.
    return PromptRules(prefix=(eos_id,) if inference_prefix == "eos" else (), max_positions=max_positions)


def fit_prompt(
    prompt_T: np.ndarray, answer_tokens: int, rules: PromptRules, name: str
) -> tuple[np.ndarray, int]:
    """Prefix plus the last prompt tokens that leave room for `answer_tokens`; also the number of tokens cut.

    Args:
        prompt_T: ids of the prompt alone.
        answer_tokens: tokens of the answer, its `</s>` included.
        rules: prefix and positions.
        name: the example, for the error text.

    Raises:
        ValueError: the answer leaves no room for a prompt, or there is neither a prompt nor a prefix.
    """
    # One more token than positions: the last one is predicted, never read.
    room = rules.max_positions + 1 - answer_tokens - len(rules.prefix)
    if room < 1:
        raise ValueError(
            f"{name}: an answer of {answer_tokens} tokens leaves no room for a prompt in "
            f"{rules.max_positions} positions; lower evaluation.max_new_tokens "
            "or drop the example from the bench"
        )
    # Positions have no token to sit on: the first answer token is predicted from the last of the prompt.
    if len(prompt_T) + len(rules.prefix) == 0:
        raise ValueError(
            f"{name}: the prompt is empty, so nothing predicts the answer's first token; "
            "set model.inference_prefix=eos or drop the example from the bench"
        )
    cut = max(0, len(prompt_T) - room)
    return np.concatenate([np.array(rules.prefix, dtype=np.int32), prompt_T[cut:].astype(np.int32)]), cut
