import dataclasses

import pytest

from megatron_iml.data.example import METRICS, Example, Task


def test_an_example_generates_unless_it_has_candidates():
    example = Example("1", "t", "B", "C", "Is it?", ("Yes",))
    assert example.candidates == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.source = "changed"  # type: ignore[misc]


def test_a_task_reads_its_examples_anew_at_every_call():
    examples = (Example("1", "t", "B", "C", "a", ("b",)), Example("2", "t", "B", "C", "c", ("d",)))
    task = Task("t", "B", "C", "rouge_l", lambda: iter(examples))
    assert [example.id for example in task.examples()] == ["1", "2"]
    assert [example.id for example in task.examples()] == ["1", "2"]


def test_metrics_are_the_three_of_the_evaluation():
    assert METRICS == ("accuracy", "exact_match", "rouge_l")
