import numpy as np
import pytest

from megatron_iml.data.example import Task
from megatron_iml.data.splits import (
    SPLITS,
    Splits,
    assign,
    check_names,
    instance_hash,
    level_of,
    load_splits,
)

TRAIN, VALIDATION, TEST = (SPLITS.index(split) for split in ("train", "validation", "test"))


def task(name: str, category: str) -> Task:
    return Task(name, "B", category, "rouge_l", lambda: iter(()))


TASKS = [task("a1", "A"), task("a2", "A"), task("b1", "B"), task("b2", "B")]


def hashes(count: int) -> tuple[np.ndarray, np.ndarray]:
    instances_N = np.array([instance_hash(1, "t", str(index)) for index in range(count)], np.uint64)
    return instances_N, np.arange(count, dtype=np.uint64)


def counted(split_N: np.ndarray) -> dict[int, int]:
    return {
        int(code): int(count) for code, count in zip(*np.unique(split_N, return_counts=True), strict=True)
    }


def test_levels_follow_category_then_task():
    splits = Splits(held_out_categories=("A",), held_out_tasks=("a1", "b1"))
    assert [level_of(splits, each) for each in TASKS] == [
        "fully_held_out",
        "fully_held_out",
        "partially_supervised",
        "fully_supervised",
    ]
    check_names(splits, TASKS)


def test_unknown_names_are_errors_with_the_nearest_one():
    with pytest.raises(ValueError, match="no task 'b11' in the sources; did you mean 'b1'"):
        check_names(Splits(held_out_tasks=("b11",)), TASKS)
    with pytest.raises(ValueError, match="no category 'Grammar' in the sources; known are A, B"):
        check_names(Splits(held_out_categories=("Grammar",)), TASKS)


def test_a_category_held_out_task_by_task_is_not_partially_supervised():
    with pytest.raises(ValueError, match="all tasks of category 'B' are held out"):
        check_names(Splits(held_out_tasks=("b1", "b2")), TASKS)


def test_training_task_gives_its_instances():
    splits = Splits(validation_examples_per_task=20, test_examples_per_task=50)
    split_N = assign(splits, "fully_supervised", *hashes(1000))
    assert counted(split_N) == {VALIDATION: 20, TEST: 50, TRAIN: 930}


def test_held_out_task_has_no_training_rows():
    splits = Splits(validation_examples_per_task=20, test_examples_per_task=50)
    for level in ("fully_held_out", "partially_supervised"):
        assert counted(assign(splits, level, *hashes(1000))) == {VALIDATION: 20, TEST: 50, -2: 930}
    assert counted(assign(splits, "fully_held_out", *hashes(7))) == {VALIDATION: 2, TEST: 5}


def test_small_training_task_gives_a_fifth():
    splits = Splits(validation_examples_per_task=20, test_examples_per_task=50)
    split_N = assign(splits, "fully_supervised", *hashes(100))
    assert counted(split_N) == {VALIDATION: 5, TEST: 15, TRAIN: 80}
    assert counted(assign(splits, "fully_supervised", *hashes(4))) == {TRAIN: 4}
    assert counted(assign(splits, "fully_supervised", *hashes(0))) == {}


def test_cap_keeps_a_random_choice():
    splits = Splits(validation_examples_per_task=1, test_examples_per_task=1, max_examples_per_task=30)
    instances_N, sources_N = hashes(100)
    split_N = assign(splits, "fully_supervised", instances_N, sources_N)
    assert counted(split_N) == {VALIDATION: 1, TEST: 1, TRAIN: 28, -1: 70}
    assert instances_N[split_N >= 0].max() < instances_N[split_N == -1].min()
    assert not np.array_equal(np.flatnonzero(split_N >= 0), np.arange(30))


def test_choice_does_not_depend_on_order():
    splits = Splits(validation_examples_per_task=3, test_examples_per_task=3)
    instances_N, sources_N = hashes(60)
    order_N = np.random.default_rng(0).permutation(60)
    straight_N = assign(splits, "fully_supervised", instances_N, sources_N)
    shuffled_N = assign(splits, "fully_supervised", instances_N[order_N], sources_N[order_N])
    assert np.array_equal(shuffled_N, straight_N[order_N])


def test_training_rows_that_repeat_a_held_out_source_are_dropped():
    splits = Splits(validation_examples_per_task=1, test_examples_per_task=1)
    instances_N, sources_N = hashes(60)
    held_out = int(instances_N.argmin())
    sources_N[:] = np.arange(60)
    sources_N[(held_out + 1) % 60] = sources_N[held_out]
    split_N = assign(splits, "fully_supervised", instances_N, sources_N)
    assert split_N[held_out] == VALIDATION
    assert split_N[(held_out + 1) % 60] in (-3, TEST)
    in_training = set(sources_N[split_N == TRAIN].tolist())
    assert not in_training & set(sources_N[(split_N == VALIDATION) | (split_N == TEST)].tolist())


def test_file_is_read_strictly(tmp_path):
    path = tmp_path / "splits.yaml"
    path.write_text("held_out_categories: [A]\ntest_examples_per_task: 5\n")
    assert load_splits(path) == Splits(held_out_categories=("A",), test_examples_per_task=5)
    for content, message in (
        ("held_out_category: [A]", "unknown key 'held_out_category'; did you mean 'held_out_categories'"),
        ("held_out_tasks: [a1]\nheld_out_tasks: [a2]", "line 2: got the key held_out_tasks twice"),
        ("seed: yes", "seed is True; give a whole number"),
        ("held_out_tasks: a1", "held_out_tasks is 'a1'; give a list of names"),
        ("test_examples_per_task: -1", "test_examples_per_task is -1; give 0 or more"),
        ("max_examples_per_task: 0", "max_examples_per_task is 0; give 1 or more"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_splits(path)
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        load_splits(tmp_path / "absent.yaml")
