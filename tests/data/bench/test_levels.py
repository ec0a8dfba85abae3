import pytest

from megatron_iml.data.bench.levels import levels_of, missing_names
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.example import Task


def task(name: str, category: str, *sources: str, **more) -> Task:
    return Task(name, "B", category, "rouge_l", lambda: iter(()), data_sources=sources, **more)


TASKS = [task("a1", "A"), task("a2", "A"), task("b1", "B"), task("b2", "B")]


def test_levels_follow_category_then_task():
    splits = Splits(held_out_categories=("A",), held_out_tasks=("a1", "b1"))
    assert levels_of(splits, TASKS) == [
        "fully_held_out",
        "fully_held_out",
        "partially_supervised",
        "fully_supervised",
    ]


def test_tasks_are_held_out_by_pattern_parent_and_data_source():
    tasks = [
        task("task9_race_qa", "B"),
        task("mmlu__law", "B", parent="mmlu"),
        task("race__high", "B", "race"),
        task("squad", "B", "squad"),
    ]
    splits = Splits(held_out_tasks=("task*_race_*", "mmlu"), held_out_data_sources=("RACE__all",))
    assert levels_of(splits, tasks) == ["partially_supervised"] * 3 + ["fully_supervised"]


def test_a_data_source_is_never_on_both_sides():
    tasks = [task("copa", "A", "copa"), task("why", "B", "copa"), task("squad", "B", "squad", "wikipedia")]
    assert levels_of(Splits(held_out_categories=("A",)), tasks) == [
        "fully_held_out",
        None,
        "fully_supervised",
    ]
    allowed = Splits(held_out_categories=("A",), shared_data_sources=("copa",))
    assert levels_of(allowed, tasks)[1] == "fully_supervised"


def test_what_is_made_for_evaluation_is_never_trained_on():
    tasks = [task("mmlu__law", "MMLU", "copa", evaluation_only=True), task("copa", "A", "copa")]
    assert levels_of(Splits(), tasks) == ["partially_supervised", "fully_supervised"]
    held_out = Splits(held_out_categories=("MMLU",))
    assert levels_of(held_out, tasks) == ["fully_held_out", "fully_supervised"]


def test_unknown_names_are_errors_with_the_nearest_one():
    with pytest.raises(ValueError, match="no task 'b11' in the sources; did you mean 'b1'"):
        levels_of(Splits(held_out_tasks=("b11",)), TASKS)
    with pytest.raises(ValueError, match="no category 'Grammar' in the sources; known are A, B"):
        levels_of(Splits(held_out_categories=("Grammar",)), TASKS)
    with pytest.raises(ValueError, match="no data source 'race' in the sources"):
        levels_of(Splits(held_out_data_sources=("race",)), TASKS)
    # Misspelt, it would leave a task out of training without a word.
    with pytest.raises(ValueError, match="no data source 'copo' in the sources; did you mean 'copa'"):
        levels_of(Splits(shared_data_sources=("copo",)), [*TASKS, task("c", "C", "copa")])


def test_the_cap_of_an_unknown_benchmark_is_an_error():
    with pytest.raises(ValueError, match="no benchmark 'b' in the sources; known are B"):
        levels_of(Splits(max_examples_of_benchmark={"b": 3}), TASKS)
    assert levels_of(Splits(max_examples_of_benchmark={"B": 3}), TASKS) == ["fully_supervised"] * 4


def test_a_file_may_name_more_than_there_is_but_not_only_that():
    splits = Splits(held_out_categories=("A", "C"), held_out_tasks=("b*", "x*"), missing_names="allow")
    assert missing_names(splits, TASKS) == ["category C", "task x*"]
    with pytest.raises(ValueError, match="no category 'C' in the sources"):
        missing_names(Splits(held_out_categories=("C",), missing_names="allow"), TASKS)


def test_a_category_held_out_task_by_task_is_not_partially_supervised():
    with pytest.raises(ValueError, match="all tasks of category 'B' are held out"):
        levels_of(Splits(held_out_tasks=("b1", "b2")), TASKS)
