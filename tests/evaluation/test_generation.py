"""Greedy generation with a model whose next token is a known function of the history."""

from typing import Any

import pytest

from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.evaluation.generation import Generation, generate
from megatron_iml.evaluation.prompts import PromptRules
from megatron_iml.evaluation.question import Question


def run(model: Any, tokenizer: Tokenizer, prompts: list[str], **settings: Any) -> list[Generation]:
    settings = {"rules": PromptRules((), 64), "max_new_tokens": 5, "batch_size": 8, **settings}
    questions = [Question(str(i), prompt, ("",)) for i, prompt in enumerate(prompts)]
    return generate(model, tokenizer, questions, track=lambda batches: batches, **settings)


def countdown(tokenizer: Tokenizer) -> Any:
    """After digit d comes d - 1, after 0 comes </s>, after anything else 9."""
    digits = tokenizer.encode("0123456789").tolist()

    def next_id(context: tuple[int, ...]) -> int:
        last = context[-1]
        if last not in digits:
            return digits[9]
        return digits[digits.index(last) - 1] if last != digits[0] else 2

    return next_id


def test_stops_at_eos_or_at_the_limit(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(next_id=countdown(tokenizer))
    answers = run(model, tokenizer, ["a3", "b9", "c0"])
    assert answers == [
        Generation("210", 4, True, 0),
        Generation("87654", 5, False, 0),
        Generation("", 1, True, 0),
    ]


def test_eos_as_the_last_allowed_token_is_finished(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(next_id=countdown(tokenizer))
    assert run(model, tokenizer, ["a3"], max_new_tokens=4) == [Generation("210", 4, True, 0)]
    assert run(model, tokenizer, ["a3"], max_new_tokens=3) == [Generation("210", 3, False, 0)]


def test_finished_sequences_leave_the_batch(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(next_id=countdown(tokenizer))
    run(model, tokenizer, ["a3", "b9", "c0"])
    # "c0" ends in the prefill; "a3" after three more tokens; nothing is decoded for the sake of nobody.
    assert model.decoded_sizes == [2, 2, 2, 1]


def test_batches_are_by_length_and_answers_in_order(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(next_id=countdown(tokenizer))
    answers = run(model, tokenizer, ["1", "xx2", "x3", "xxx0"], batch_size=2)
    assert [[len(prompt) for prompt in batch] for batch in model.prefills] == [[4, 3], [2, 1]]
    assert [answer.text for answer in answers] == ["0", "10", "210", ""]


def test_prefix_comes_first_and_survives_the_cut(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(next_id=countdown(tokenizer))
    answers = run(model, tokenizer, ["ab3", "3"], rules=PromptRules((2,), 6), max_new_tokens=5)
    # 6 positions hold 7 tokens, 5 of them new: the prefix and one byte of the prompt.
    three = int(tokenizer.encode("3")[0])
    assert model.prefills == [[(2, three), (2, three)]]
    assert answers == [Generation("210", 4, True, 2), Generation("210", 4, True, 0)]


def test_trailing_blanks_of_a_prompt_are_dropped(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model()
    run(model, tokenizer, ["A:\n  "])
    assert model.prefills == [[tuple(tokenizer.encode("A:\n").tolist())]]


def test_limit_that_leaves_no_prompt_is_an_error(tokenizer: Tokenizer, fake_model: Any) -> None:
    with pytest.raises(ValueError, match="0: an answer of 64 tokens .* lower evaluation.max_new_tokens"):
        run(fake_model(), tokenizer, ["a"], rules=PromptRules((), 63), max_new_tokens=64)


def test_no_prompt_at_all(tokenizer: Tokenizer, fake_model: Any) -> None:
    assert run(fake_model(), tokenizer, []) == []
