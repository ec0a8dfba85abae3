"""Greedy generation: the most likely token, again and again, until `</s>` or the limit.

What enters: prompts (text). What leaves: one text per prompt, in the order of the prompts. Prompts are
decoded in batches of similar length, the longest batch first so that too large a batch fails at once; a
finished sequence leaves its batch.

    prompts ["2 + 2 =\\nA:", "Hi"], the model answers " 4 </s>" and never stops, max_new_tokens 3
    -> Generation(" 4", 2 tokens, finished), Generation(" a b c", 3 tokens, not finished)

A prompt is cut on the left so that it and `max_new_tokens` fit the model's positions.
Shape letters: B = sequences still in decoding, T = tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.evaluation.language_model import CacheT, LanguageModel
from megatron_iml.evaluation.prompts import PromptRules, fit_prompt
from megatron_iml.evaluation.question import Question


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer; `num_tokens` counts `</s>`, `finished` says whether it came before the limit."""

    text: str
    num_tokens: int
    finished: bool
    cut_tokens: int


def generate(
    model: LanguageModel[CacheT],
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    rules: PromptRules,
    max_new_tokens: int,
    batch_size: int,
    track: Callable[[Sequence[list[int]]], Iterable[list[int]]],
) -> list[Generation]:
    """Answer every prompt greedily.

    Args:
        model: anything with `prefill` and `decode`.
        tokenizer: the checkpoint's.
        questions: only their prompts are read.
        rules: prefix and the longest document in positions.
        max_new_tokens: longest answer, `</s>` included; at least 1.
        batch_size: prompts decoded together.
        track: passes batches (indices of questions) through, e.g. drawing a progress bar.

    Raises:
        ValueError: `max_new_tokens` leaves no room for a prompt, or a prompt is empty and there is no prefix.
    """
    assert max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}"
    # As training encodes a source: a space left at the end would be a token of its own.
    encoded = tokenizer.encode_batch([question.prompt.rstrip(" ") for question in questions])
    fitted = [
        fit_prompt(prompt_T, max_new_tokens, rules, question.id)
        for question, prompt_T in zip(questions, encoded, strict=True)
    ]
    # Of similar length, a batch's cache has little room that nobody fills.
    longest_first = sorted(range(len(fitted)), key=lambda i: -len(fitted[i][0]))
    batches = [longest_first[at : at + batch_size] for at in range(0, len(fitted), batch_size)]
    answers: dict[int, Generation] = {}
    for batch in track(batches):
        answered = _decode_batch(model, [fitted[i][0] for i in batch], max_new_tokens, tokenizer.eos_id)
        for i, tokens in zip(batch, answered, strict=True):
            # Each answer has a token at least: the prompt itself predicts one.
            finished = tokens[-1] == tokenizer.eos_id
            answers[i] = Generation(tokenizer.decode(tokens), len(tokens), finished, fitted[i][1])
    return [answers[i] for i in range(len(questions))]


def _decode_batch(
    model: LanguageModel[CacheT], prompts: Sequence[np.ndarray], max_new_tokens: int, eos_id: int
) -> list[list[int]]:
    """Token ids of every answer, `</s>` included where it came."""
    # [B], and shorter from step to step; `active_B` says whose each entry is.
    cache, next_B = model.prefill(prompts, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    active_B = np.arange(len(prompts))
    for new_tokens in range(1, max_new_tokens + 1):
        for sequence, token in zip(active_B, next_B, strict=True):
            answers[sequence].append(int(token))
        # After appending: `</s>` counts as a token of the answer.
        going_K = np.flatnonzero(next_B != eos_id)
        # Not one decode more than is used: its token would not fit the cache.
        if len(going_K) == 0 or new_tokens == max_new_tokens:
            break
        # Dropping a finished sequence copies the cache, so only when there is one.
        if len(going_K) < len(active_B):
            cache.keep(going_K)
            active_B, next_B = active_B[going_K], next_B[going_K]
        next_B = model.decode(cache, next_B)
    return answers
