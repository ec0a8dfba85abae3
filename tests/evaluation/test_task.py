"""One task, by each of its metrics."""

from dataclasses import replace

from megatron_iml.evaluation.question import Question
from megatron_iml.evaluation.task import Evaluator, ExampleScore, score_questions


def test_accuracy_ranks(evaluator: Evaluator) -> None:
    questions = [Question("1", "q:", ("a",), ("b", "a")), Question("2", "q:", ("b",), ("b", "a"))]
    scores = score_questions(evaluator, questions, "accuracy", lambda work: work)
    # The blank and </s> cost 1.0 each, "a" 0.5 and "b" 1.0.
    assert scores == [
        ExampleScore("1", 1.0, "a", ("a",), (-3.0, -2.5), 0, True),
        ExampleScore("2", 0.0, "a", ("b",), (-3.0, -2.5), 0, True),
    ]


def test_mean_scoring_comes_from_the_conditions(evaluator: Evaluator) -> None:
    conditions = replace(evaluator.conditions, scoring="mean")
    [score] = score_questions(
        replace(evaluator, conditions=conditions),
        [Question("1", "q:", ("b",), ("bb", "b"))],
        "accuracy",
        lambda work: work,
    )
    assert score.candidate_scores == (-1.0, -1.0)
    assert score.score == 0.0


def test_text_metrics_generate(evaluator: Evaluator) -> None:
    # 4 new tokens: " xy" and </s>.
    questions = [Question("1", "q:", ("XY",)), Question("2", "q:", ("x y",))]
    matches = score_questions(evaluator, questions, "exact_match", lambda work: work)
    assert matches == [
        ExampleScore("1", 1.0, "xy", ("XY",), (), 0, True),
        ExampleScore("2", 0.0, "xy", ("x y",), (), 0, True),
    ]
    rouge = score_questions(evaluator, [Question("1", "q:", ("xy z", "w"))], "rouge_l", lambda work: work)
    assert rouge[0].score == 2 / 3


def test_limits_and_prefix_come_from_the_conditions(evaluator: Evaluator) -> None:
    conditions = replace(evaluator.conditions, max_new_tokens=3, max_positions=5, inference_prefix="eos")
    [score] = score_questions(
        replace(evaluator, conditions=conditions),
        [Question("1", "abc:", ("xy",))],
        "exact_match",
        lambda work: work,
    )
    # 5 positions hold 6 tokens: </s>, 2 of 4 prompt bytes, 3 new ones, none of which is </s>.
    assert score == ExampleScore("1", 1.0, "xy", ("xy",), (), 2, False)
    assert evaluator.model.prefills[0][0][0] == 2
