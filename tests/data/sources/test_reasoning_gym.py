import subprocess
import sys
from collections import Counter

import pytest

from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources import reasoning_gym

DIGEST = """
import hashlib
from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources.reasoning_gym import read
digest = hashlib.sha256()
for task in read(None, Drops(), examples_per_task=6, seed=3):
    for example in task.examples():
        digest.update(repr(example).encode())
print(digest.hexdigest())
"""


def test_tasks_are_many_and_their_categories_too():
    categories = Counter(task.category for task in reasoning_gym.GYM_TASKS)
    assert len(reasoning_gym.GYM_TASKS) == len({task.name for task in reasoning_gym.GYM_TASKS}) == 52
    assert len(categories) == 11
    assert (categories["graphs"], categories["logic"]) == (4, 4)


def test_candidates_go_with_accuracy():
    for task in reasoning_gym.GYM_TASKS:
        assert (task.metric == "accuracy") == bool(task.candidates), task.name


def test_every_task_yields_short_distinct_questions_with_an_answer_on_offer():
    pytest.importorskip("reasoning_gym", reason="needs the demo extra")
    drops = Drops()
    for task in reasoning_gym.read(None, drops, examples_per_task=30, seed=2):
        examples = list(task.examples())
        assert len({example.source for example in examples}) == len(examples) >= 20, task.name
        counts = drops.task("ReasoningGym", task.name)
        assert (counts.read, counts.dropped.total()) == (30, 30 - len(examples))
        for example in examples:
            assert len(example.source) < 1400, task.name
            assert 0 < len(example.targets[0]) < 200, task.name
            assert not example.candidates or example.targets[0] in example.candidates, task.name


def test_seeds_give_other_questions():
    pytest.importorskip("reasoning_gym", reason="needs the demo extra")
    sources = []
    for seed in (1, 2):
        tasks = reasoning_gym.read(None, Drops(), examples_per_task=20, seed=seed)
        task = next(task for task in tasks if task.name == "chain_sum")
        sources.append({example.source for example in task.examples()})
    # The package seeds item i with seed + i: neighbouring seeds would share 19 of 20 items.
    assert not sources[0] & sources[1]


def test_equal_in_processes_with_other_hash_seeds():
    pytest.importorskip("reasoning_gym", reason="needs the demo extra")
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-iml\[demo\]'"):
        next(reasoning_gym.read(None, Drops()))


def test_options_out_of_range():
    with pytest.raises(ValueError, match="got examples_per_task 0 and seed 1; give 1 or more"):
        next(reasoning_gym.read(None, Drops(), examples_per_task=0))
