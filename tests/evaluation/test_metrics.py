"""Metrics against values worked out by hand."""

import math

import pytest

from megatron_iml.evaluation.metrics import accuracy, exact_match, normalise_answer, rouge_l


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        (" The  Yes.\n", "the yes"),
        ("(A)", "(a)"),
        ("]", "]"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ("etc..", "etc."),
        ("yes .", "yes"),
        ("", ""),
    ],
)
def test_normalise_answer(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


def test_exact_match_takes_any_reference_and_keeps_punctuation() -> None:
    assert exact_match(" the yes. ", ["no", "The Yes"]) == 1.0
    assert exact_match("yes", ["no", "maybe"]) == 0.0
    assert exact_match("]", [")"]) == 0.0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Common subsequence "the cat sat": precision 3/3, recall 3/6.
    assert rouge_l("the cat sat", ["the cat sat on the mat"]) == pytest.approx(2 / 3)
    # Lin (2004), section 3: "the gunman", 2 of 4 on both sides. "killed" and "kill" share a stem.
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == 1.0


def test_rouge_l_takes_the_best_reference() -> None:
    assert rouge_l("a b", ["c d", "a b c d"]) == pytest.approx(2 * 1.0 * 0.5 / 1.5)


def test_rouge_l_without_latin_tokens_is_zero() -> None:
    assert rouge_l("你好", ["你好"]) == 0.0
    assert rouge_l("", ["word"]) == 0.0


@pytest.mark.parametrize(
    ("scores", "correct", "expected"),
    [
        ([-1.0, -2.0, -1.5], {0}, 1.0),
        ([-1.0, -2.0, -1.5], {1}, 0.0),
        ([-1.0, -1.0], {0}, 0.0),
        # Two right answers may tie with one another; one of them must beat the wrong ones.
        ([-1.0, -1.0, -2.0], {0, 1}, 1.0),
        ([-3.0, -1.0, -2.0], {0, 1}, 1.0),
        ([math.nan, -2.0], {0}, 0.0),
        ([-2.0, math.nan], {0}, 0.0),
        ([-5.0], {0}, 1.0),
    ],
)
def test_accuracy_needs_a_strict_win(scores: list[float], correct: set[int], expected: float) -> None:
    assert accuracy(scores, correct) == expected
