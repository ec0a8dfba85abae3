"""Prompts: prefix in front, cut on the left, at the very edge of the positions."""

import numpy as np
import pytest

from megatron_iml.evaluation.prompts import PromptRules, fit_prompt, prompt_rules


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


def test_prefix_of_a_checkpoint() -> None:
    assert prompt_rules("eos", 2, 2048) == PromptRules((2,), 2048)
    assert prompt_rules("none", 2, 2048) == PromptRules((), 2048)


@pytest.mark.parametrize(
    ("prefix", "answer_tokens", "kept", "cut"),
    [
        # 4 positions hold 5 tokens, the last of which is never read.
        ((), 1, [11, 12, 13, 14], 0),
        ((), 2, [12, 13, 14], 1),
        ((2,), 2, [2, 13, 14], 2),
        ((2,), 3, [2, 14], 3),
    ],
)
def test_left_cut_by_hand(prefix: tuple[int, ...], answer_tokens: int, kept: list[int], cut: int) -> None:
    fitted_T, num_cut = fit_prompt(ids(11, 12, 13, 14), answer_tokens, PromptRules(prefix, 4), "x")
    assert (fitted_T.tolist(), num_cut) == (kept, cut)
    assert fitted_T.dtype == np.int32


def test_answer_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="example 9: an answer of 5 tokens leaves no room .* 4 positions"):
        fit_prompt(ids(11), 5, PromptRules((), 4), "example 9")


def test_empty_prompt_needs_a_prefix() -> None:
    with pytest.raises(ValueError, match="prompt is empty.*\\bset model.inference_prefix=eos"):
        fit_prompt(ids(), 1, PromptRules((), 4), "example 9")
    assert fit_prompt(ids(), 1, PromptRules((2,), 4), "example 9")[0].tolist() == [2]
