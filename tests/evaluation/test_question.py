"""Bench rows as questions."""

import pytest

from megatron_iml.evaluation.question import Question, question_from_row


def test_accuracy_row_has_candidates_and_a_right_one() -> None:
    row = {"id": "7", "src": "2 > 1?\nA:", "tgt": "Yes", "candidates": ["No", " Yes "]}
    question = question_from_row(row, "accuracy", "f")
    assert question == Question("7", "2 > 1?\nA:", ("Yes",), ("No", " Yes "))
    assert question.correct == {1}


def test_all_references_count_as_right() -> None:
    row = {"id": "7", "src": "s", "tgt": "a", "references": ["a", "c"], "candidates": ["a", "b", "c"]}
    assert question_from_row(row, "accuracy", "f").correct == {0, 2}


def test_other_metrics_generate_even_if_there_are_candidates() -> None:
    row = {"id": "7", "src": "s", "tgt": "a", "candidates": ["a", "b"]}
    assert question_from_row(row, "rouge_l", "f") == Question("7", "s", ("a",), ())


@pytest.mark.parametrize("candidates", [[], ["b"]])
def test_accuracy_without_a_right_candidate_is_an_error(candidates: list[str]) -> None:
    row = {"id": "7", "src": "s", "tgt": "a", "candidates": candidates}
    with pytest.raises(ValueError, match=r"test/f.jsonl, example 7: accuracy needs a candidate .*\['a'\]"):
        question_from_row(row, "accuracy", "test/f.jsonl")
