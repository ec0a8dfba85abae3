"""From example scores to the numbers of the report: unweighted means, level by level.

What enters: one `TaskScore` per bench file. What leaves: an `Aggregate`. The rule is OPT-IML's (section
4.1 of the paper): example -> part (a subject of MMLU) -> task -> mean over the benchmarks that hold the same
task -> category -> level, and the headline number is the mean over the category columns of all levels. A
category with tasks of two levels is two columns, as in the paper's tables. A benchmark's own number is the
mean over its tasks, whatever level.

    copa (PromptSource) 0.8, copa (FLAN) 0.6 -> copa 0.7; glucose 0.5 -> category cause_effect 0.6
    cause_effect 0.6, entailment 0.4         -> level fully_held_out 0.5

Standard errors: a task's is the sample standard deviation (n - 1) over sqrt(n), None for n = 1; that of a
mean of k parts is sqrt(sum of squares) / k. It measures the sampling of examples, not the choice of
tasks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_iml.data.bench.splits import LEVELS, Level
from megatron_iml.data.example import Metric


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of `count` parts and its standard error, which is None where a part has only one example."""

    mean: float
    # None and not 0, which would claim certainty.
    standard_error: float | None
    count: int


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One bench file's score; `estimate.count` is its number of examples.

    `cut_prompts` counts prompts cut on the left, `unfinished_answers` those that hit the length limit.
    """

    task: str
    benchmark: str
    category: str
    level: Level
    metric: Metric
    estimate: Estimate
    cut_prompts: int = 0
    unfinished_answers: int = 0
    parent: str = ""
    """The task this is a part of, or another benchmark's form of; empty for a task of its own."""


@dataclass(frozen=True, slots=True)
class Column:
    """A category on one level of generalisation."""

    level: Level
    category: str


@dataclass(frozen=True)
class Aggregate:
    """All averages of an evaluation; levels in order of `LEVELS`, everything else sorted by name."""

    tasks: tuple[TaskScore, ...]
    columns: Mapping[Column, Estimate]
    levels: Mapping[Level, Estimate]
    benchmarks: Mapping[str, Estimate]
    overall: Estimate


def estimate_examples(scores: Sequence[float]) -> Estimate:
    """Mean of example scores; the standard error is the sample standard deviation over sqrt(n)."""
    count = len(scores)
    assert count > 0, "a task needs at least one scored example, got 0"
    # fsum: the same mean whatever the order in which replicas bring the scores.
    mean = math.fsum(scores) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((score - mean) ** 2 for score in scores) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def estimate_parts(parts: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent parts; the standard error is sqrt(sum of squares) / k."""
    count = len(parts)
    assert count > 0, "a mean needs at least one part, got 0"
    mean = math.fsum(part.mean for part in parts) / count
    # One unknown error makes the sum unknown; leaving it out would flatter it.
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    if len(errors) < count:
        return Estimate(mean, None, count)
    return Estimate(mean, math.sqrt(math.fsum(error**2 for error in errors)) / count, count)


def aggregate(tasks: Iterable[TaskScore]) -> Aggregate:
    """Average task scores up to columns, levels, benchmarks and the overall number.

    Raises ValueError if there is no task, if a level is unknown, or if a file appears twice.
    """
    # Walked twice, and it may be a generator.
    unordered = list(tasks)
    _check(unordered)
    # The report's order. The means do not depend on it: math.fsum rounds once.
    ordered = tuple(sorted(unordered, key=lambda t: (LEVELS.index(t.level), t.category, t.task, t.benchmark)))
    # (column, task, benchmark) -> its parts. By column: parts of one task may lie on two levels.
    subtasks: defaultdict[tuple[Column, str, str], list[Estimate]] = defaultdict(list)
    for task in ordered:
        column = Column(task.level, task.category)
        subtasks[column, task.parent or task.task, task.benchmark].append(task.estimate)
    holders: defaultdict[tuple[Column, str], list[Estimate]] = defaultdict(list)
    # Whole tasks of every level, each once: a task that another benchmark has as well counts for both.
    benchmarks: defaultdict[str, list[Estimate]] = defaultdict(list)
    for (column, name, benchmark), estimates in subtasks.items():
        # Parts first: as tasks of their own, the 57 subjects of MMLU would be most of a benchmark.
        whole = estimate_parts(estimates) if len(estimates) > 1 else estimates[0]
        holders[column, name].append(whole)
        benchmarks[benchmark].append(whole)
    merged: defaultdict[Column, list[Estimate]] = defaultdict(list)
    for (column, _), estimates in holders.items():
        # First over benchmarks: a task that three of them hold would count three times.
        merged[column].append(estimate_parts(estimates))
    columns = {column: estimate_parts(estimates) for column, estimates in merged.items()}
    levels = {
        level: estimate_parts(parts)
        for level in LEVELS
        if (parts := [estimate for column, estimate in columns.items() if column.level == level])
    }
    return Aggregate(
        tasks=ordered,
        columns=columns,
        levels=levels,
        benchmarks={name: estimate_parts(benchmarks[name]) for name in sorted(benchmarks)},
        # Over columns and not over levels, as in the paper's tables: a level with one category weighs little.
        overall=estimate_parts(list(columns.values())),
    )


def _check(tasks: Sequence[TaskScore]) -> None:
    if not tasks:
        raise ValueError("no task was scored: the bench has no file in this split; choose another split")
    seen = set()
    for task in tasks:
        if task.level not in LEVELS:
            raise ValueError(
                f"task {task.task} of {task.benchmark} has level {task.level!r}, "
                f"allowed are {', '.join(LEVELS)}: rebuild the bench"
            )
        key = (task.benchmark, task.category, task.task)
        if key in seen:
            raise ValueError(
                f"task {task.task} of {task.benchmark}, category {task.category}, is listed twice: "
                "rebuild the bench"
            )
        seen.add(key)
