import numpy as np
import pytest

from megatron_iml.data.bench.splits import SPLITS, Splits, assign, load_splits
from megatron_iml.data.example import instance_hash

TRAIN, VALIDATION, TEST = (SPLITS.index(split) for split in ("train", "validation", "test"))


def hashes(count: int) -> tuple[np.ndarray, np.ndarray]:
    instances_N = np.array([instance_hash(1, "t", str(index)) for index in range(count)], np.uint64)
    return instances_N, np.arange(count, dtype=np.uint64)


def counted(split_N: np.ndarray) -> dict[int, int]:
    return {
        int(code): int(count) for code, count in zip(*np.unique(split_N, return_counts=True), strict=True)
    }


def test_training_task_gives_its_instances():
    splits = Splits(validation_examples_per_task=20, test_examples_per_task=50)
    split_N = assign(splits, "B", "fully_supervised", *hashes(1000))
    assert counted(split_N) == {VALIDATION: 20, TEST: 50, TRAIN: 930}


def test_held_out_task_has_no_training_rows():
    splits = Splits(validation_examples_per_task=20, test_examples_per_task=50)
    for level in ("fully_held_out", "partially_supervised"):
        assert counted(assign(splits, "B", level, *hashes(1000))) == {VALIDATION: 20, TEST: 50, -2: 930}
    assert counted(assign(splits, "B", "fully_held_out", *hashes(7))) == {VALIDATION: 2, TEST: 5}


def test_small_training_task_gives_a_fifth():
    splits = Splits(validation_examples_per_task=20, test_examples_per_task=50)
    split_N = assign(splits, "B", "fully_supervised", *hashes(100))
    assert counted(split_N) == {VALIDATION: 5, TEST: 15, TRAIN: 80}
    assert counted(assign(splits, "B", "fully_supervised", *hashes(4))) == {TRAIN: 4}
    assert counted(assign(splits, "B", "fully_supervised", *hashes(0))) == {}


def test_cap_keeps_a_random_choice():
    splits = Splits(validation_examples_per_task=1, test_examples_per_task=1, max_examples_per_task=30)
    instances_N, sources_N = hashes(100)
    split_N = assign(splits, "B", "fully_supervised", instances_N, sources_N)
    assert counted(split_N) == {VALIDATION: 1, TEST: 1, TRAIN: 28, -1: 70}
    assert instances_N[split_N >= 0].max() < instances_N[split_N == -1].min()
    assert not np.array_equal(np.flatnonzero(split_N >= 0), np.arange(30))


def test_choice_does_not_depend_on_order():
    splits = Splits(validation_examples_per_task=3, test_examples_per_task=3)
    instances_N, sources_N = hashes(60)
    order_N = np.random.default_rng(0).permutation(60)
    straight_N = assign(splits, "B", "fully_supervised", instances_N, sources_N)
    shuffled_N = assign(splits, "B", "fully_supervised", instances_N[order_N], sources_N[order_N])
    assert np.array_equal(shuffled_N, straight_N[order_N])


def test_training_rows_that_repeat_a_held_out_source_are_dropped():
    splits = Splits(validation_examples_per_task=1, test_examples_per_task=1)
    instances_N, sources_N = hashes(60)
    held_out = int(instances_N.argmin())
    sources_N[:] = np.arange(60)
    sources_N[(held_out + 1) % 60] = sources_N[held_out]
    split_N = assign(splits, "B", "fully_supervised", instances_N, sources_N)
    assert split_N[held_out] == VALIDATION
    assert split_N[(held_out + 1) % 60] in (-3, TEST)
    in_training = set(sources_N[split_N == TRAIN].tolist())
    assert not in_training & set(sources_N[(split_N == VALIDATION) | (split_N == TEST)].tolist())


def test_a_benchmark_may_have_its_own_cap():
    splits = Splits(max_examples_of_benchmark={"FLAN": 30})
    assert counted(assign(splits, "FLAN", "fully_supervised", *hashes(100)))[-1] == 70
    assert -1 not in counted(assign(splits, "NIV2", "fully_supervised", *hashes(100)))


def test_prompts_of_one_instance_never_straddle():
    splits = Splits(validation_examples_per_task=2, test_examples_per_task=3)
    instances_N, sources_N = hashes(60)
    # Four prompts an instance: the line after five rows falls inside one.
    instances_N = np.repeat(instances_N[:15], 4)
    split_N = assign(splits, "B", "fully_supervised", instances_N, sources_N)
    held_out = np.isin(split_N, (VALIDATION, TEST))
    assert held_out.sum() == 5
    assert not np.isin(instances_N[split_N == TRAIN], instances_N[held_out]).any()
    assert counted(split_N)[-3] == 3


def test_a_task_without_level_gives_no_row():
    assert counted(assign(Splits(), "B", None, *hashes(9))) == {-4: 9}


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
        ("max_examples_of_benchmark: {FLAN: 0}", "splits: FLAN is 0; give 1 or more"),
        ("max_examples_of_benchmark: {FLAN: x}", "give benchmarks with whole numbers"),
        ("missing_names: skip", "missing_names is 'skip'; choose from refuse, allow"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_splits(path)
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        load_splits(tmp_path / "absent.yaml")
