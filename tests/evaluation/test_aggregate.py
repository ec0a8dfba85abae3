"""Averages worked out by hand, and that weights never enter."""

import math
from dataclasses import replace

import pytest

from megatron_iml.evaluation.aggregate import (
    Column,
    Estimate,
    TaskScore,
    aggregate,
    estimate_examples,
    estimate_parts,
)


def score(task: str, benchmark: str, category: str, level: str, mean: float, count: int = 10) -> TaskScore:
    return TaskScore(task, benchmark, category, level, "accuracy", Estimate(mean, 0.1, count))


def test_examples_by_hand() -> None:
    # Variance of 1, 0, 0, 1 with n - 1: 4 * 0.25 / 3.
    estimate = estimate_examples([1.0, 0.0, 0.0, 1.0])
    assert estimate.mean == 0.5
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert estimate.count == 4
    assert estimate_examples([1.0]) == Estimate(1.0, None, 1)


def test_parts_by_hand() -> None:
    merged = estimate_parts([Estimate(0.2, 0.03, 5), Estimate(0.4, 0.04, 500)])
    assert merged.mean == pytest.approx(0.3)
    assert merged.standard_error == pytest.approx(0.05 / 2)
    assert merged.count == 2
    assert estimate_parts([Estimate(0.2, None, 1), Estimate(0.4, 0.04, 9)]).standard_error is None


def test_levels_by_hand() -> None:
    held_out, partial, full = "fully_held_out", "partially_supervised", "fully_supervised"
    result = aggregate(
        [
            score("squad", "flan", "qa", full, 0.9),
            score("race", "sni", "qa", partial, 0.2),
            score("copa", "flan", "cause_effect", held_out, 0.6, count=1000),
            score("copa", "promptsource", "cause_effect", held_out, 0.8),
            score("glucose", "sni", "cause_effect", held_out, 0.5),
            score("rte", "flan", "entailment", held_out, 0.4),
        ]
    )
    columns = {(column.level, column.category): e.mean for column, e in result.columns.items()}
    assert columns == pytest.approx(
        {
            (held_out, "cause_effect"): 0.6,  # (mean(0.6, 0.8) + 0.5) / 2
            (held_out, "entailment"): 0.4,
            (partial, "qa"): 0.2,
            (full, "qa"): 0.9,
        }
    )
    assert {level: e.mean for level, e in result.levels.items()} == pytest.approx(
        {held_out: 0.5, partial: 0.2, full: 0.9}
    )
    assert list(result.levels) == [held_out, partial, full]
    # Over the four columns, not over the three levels (0.5333).
    assert result.overall.mean == pytest.approx(0.525)
    assert {name: e.mean for name, e in result.benchmarks.items()} == pytest.approx(
        {"flan": (0.9 + 0.6 + 0.4) / 3, "promptsource": 0.8, "sni": 0.35}
    )
    assert [(task.level, task.task) for task in result.tasks] == [
        (held_out, "copa"),
        (held_out, "copa"),
        (held_out, "glucose"),
        (held_out, "rte"),
        (partial, "race"),
        (full, "squad"),
    ]


def test_errors_are_carried_through_the_means() -> None:
    result = aggregate(
        [
            score("copa", "flan", "cause", "fully_held_out", 0.6),
            score("copa", "sni", "cause", "fully_held_out", 0.8),
            score("rte", "flan", "nli", "fully_held_out", 0.4),
        ]
    )
    copa = 0.1 * math.sqrt(2) / 2
    assert result.columns[Column("fully_held_out", "cause")].standard_error == pytest.approx(copa)
    assert result.overall.standard_error == pytest.approx(math.hypot(copa, 0.1) / 2)


def test_absent_level_is_left_out() -> None:
    assert list(aggregate([score("a", "b", "c", "fully_supervised", 0.5)]).levels) == ["fully_supervised"]


def test_what_cannot_be_averaged_is_an_error() -> None:
    with pytest.raises(ValueError, match="no task was scored"):
        aggregate([])
    with pytest.raises(ValueError, match="level 'held_out', allowed are fully_held_out, "):
        aggregate([score("a", "b", "c", "held_out", 0.5)])
    with pytest.raises(ValueError, match="task a of b, category c, is listed twice"):
        aggregate([score("a", "b", "c", "fully_supervised", 0.5)] * 2)


def test_parts_are_averaged_before_anything_else() -> None:
    level = "partially_supervised"
    subjects = [
        replace(score(f"mmlu__{name}", "MMLU", "MMLU", level, mean), parent="mmlu")
        for name, mean in (("law", 0.2), ("physics", 0.4), ("virology", 0.6))
    ]
    result = aggregate(
        [*subjects, score("mmlu", "Other", "MMLU", level, 0.8), score("x", "MMLU", "X", level, 1)]
    )
    # (mean(0.2, 0.4, 0.6) + 0.8) / 2, and x counts as much as all subjects.
    assert result.columns[Column(level, "MMLU")].mean == pytest.approx(0.6)
    assert result.benchmarks["MMLU"].mean == pytest.approx(0.7)


def test_a_task_is_one_task_whatever_its_benchmarks_call_it() -> None:
    level = "fully_held_out"
    copa = [
        replace(score("super_glue__copa", "PromptSource", "cause", level, 0.8), parent="copa"),
        replace(score("copa", "FLAN", "cause", level, 0.4), parent="copa"),
    ]
    result = aggregate([*copa, score("glucose", "NIV2", "cause", level, 0.2)])
    assert result.columns[Column(level, "cause")].mean == pytest.approx((0.6 + 0.2) / 2)
