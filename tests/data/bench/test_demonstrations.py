import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_iml.data.bench.demonstrations import (
    Demonstrations,
    add_demonstrations,
    shot_shares,
    with_demonstrations,
)
from megatron_iml.data.bench.folder import Bench, verify_bench
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.bench.writer import build_bench
from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops

ROOT = Path(__file__).parents[3]
RULE = "Instructions: Add one."


def tasks_of(drops: Drops) -> list[Task]:
    def make(name: str, category: str, count: int, instruction: str) -> Task:
        def examples():
            for index in range(count):
                drops.task("B", name).read += 1
                source = f"{instruction}\nInput: {index}" if instruction else f"What follows {index}?"
                # Pretraining text has no source.
                source = "" if name == "text" else source
                yield Example(
                    str(index), name, "B", category, source, (f"{index + 1}",), instruction=instruction
                )

        return Task(name, "B", category, "rouge_l", examples)

    return [
        make("task_level", "A", 300, RULE),
        make("instance_level", "A", 300, ""),
        make("held", "C", 30, RULE),
        make("tiny", "D", 3, ""),
        make("text", "A", 40, ""),
    ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    drops = Drops()
    splits = Splits(
        held_out_categories=("C", "D"), validation_examples_per_task=10, test_examples_per_task=20
    )
    return build_bench(tasks_of(drops), drops, splits, tmp_path_factory.mktemp("zero") / "bench")


def rows_of(bench: Bench, task: str, split: str = "test"):
    (entry,) = [entry for entry in bench.files(split) if entry.task == task]
    return list(bench.rows(entry))


def shown_numbers(prompt: str, mark: str) -> list[int]:
    """Numbers that a prompt mentions after `mark`, in their order."""
    return [int(part.split()[0].rstrip("?")) for part in prompt.split(mark)[1:]]


def test_examples_by_hand():
    row = {"id": "1", "src": f"{RULE}\nInput: 1\nAnswer:", "tgt": "2", "instruction": len(RULE)}
    other = row | {"src": f"{RULE}\nInput: 7\nA:", "tgt": "8"}
    prompt = with_demonstrations(row, [other, other], "\n\n")
    assert prompt["src"] == f"{RULE}\n\nInput: 7\nA: 8\n\nInput: 7\nA: 8\n\nInput: 1\nAnswer:"
    assert prompt["src"][: prompt["instruction"]] == RULE
    row = {"id": "1", "src": "Is it?\nA:", "tgt": "Yes"}
    other = {"id": "2", "src": "Was it? ", "tgt": "No"}
    assert with_demonstrations(row, [other], "\n\n\n")["src"] == "Was it? No\n\n\nIs it?\nA:"
    assert with_demonstrations(row, [], "\n\n") == row


def test_every_prompt_shows_right_answers_of_other_rows(bench, tmp_path):
    shown = add_demonstrations(bench, Demonstrations(shots=5), tmp_path / "shown")
    verify_bench(tmp_path / "shown")
    assert {entry.split for entry in shown.entries} == {"validation", "test"}
    train = {int(row["id"]) for row in rows_of(bench, "task_level", "train")}
    for row in rows_of(shown, "task_level"):
        assert row["src"].startswith(f"{RULE}\n\nInput: ")
        assert row["src"].count(RULE) == 1
        *demonstrations, asked = shown_numbers(row["src"], "Input: ")
        assert asked == int(row["id"])
        assert len(set(demonstrations)) == 5 and set(demonstrations) <= train
        assert all(f": {number + 1}\n\n" in row["src"] for number in demonstrations)
    for row in rows_of(shown, "instance_level"):
        *demonstrations, asked = shown_numbers(row["src"], "What follows ")
        assert asked == int(row["id"]) and len(set(demonstrations)) == 5
    assert [row["src"] for row in rows_of(shown, "text")] == [""] * len(rows_of(shown, "text"))


def test_a_held_out_task_shows_the_other_evaluation_split(bench, tmp_path):
    shown = add_demonstrations(bench, Demonstrations(shots=3), tmp_path / "shown")
    for split, other in (("test", "validation"), ("validation", "test")):
        known = {int(row["id"]) for row in rows_of(bench, "held", other)}
        for row in rows_of(shown, "held", split):
            *demonstrations, _ = shown_numbers(row["src"], "Input: ")
            assert len(demonstrations) == 3 and set(demonstrations) <= known


def test_small_tasks_show_what_they_have_and_say_so(bench, tmp_path):
    shown = add_demonstrations(bench, Demonstrations(shots=5), tmp_path / "shown")
    assert [len(shown_numbers(row["src"], "What follows ")) for row in rows_of(shown, "tiny")] == [2, 2]
    account = shown.ledger()["tasks"]["B__D__tiny"]
    assert account["repaired"] == {"fewer demonstrations than drawn: the task has no more": 3}


def test_long_prompts_lose_demonstrations_not_the_instruction(bench, tmp_path):
    shown = add_demonstrations(bench, Demonstrations(shots=5, longest_source=90), tmp_path / "shown")
    prompts = [row["src"] for row in rows_of(shown, "task_level")]
    assert all(len(prompt) <= 90 and prompt.startswith(RULE) for prompt in prompts)
    assert {len(shown_numbers(prompt, "Input: ")) - 1 for prompt in prompts} <= {1, 2, 3}
    # The one nearest to the question stays.
    full = add_demonstrations(bench, Demonstrations(shots=5), tmp_path / "full")
    for row, whole in zip(prompts, rows_of(full, "task_level"), strict=True):
        kept = shown_numbers(row, "Input: ")
        assert kept == shown_numbers(whole["src"], "Input: ")[-len(kept) :]
    left_out = shown.ledger()["tasks"]["B__A__task_level"]["repaired"]
    assert left_out["demonstration left out: the prompt would be too long"] > 20


def test_a_training_prompt_never_shows_its_own_answer(bench, tmp_path):
    how = Demonstrations(shots=9, pool=10)
    shown = add_demonstrations(bench, how, tmp_path / "shown", ("train",))
    rows = rows_of(shown, "instance_level", "train")
    # The ten rows of the pool see the other nine, and all others nine of the ten.
    for row in rows:
        *demonstrations, asked = shown_numbers(row["src"], "What follows ")
        assert len(demonstrations) == 9 and asked not in demonstrations
    pool = {int(row["id"]) for row in rows[:10]}
    assert {n for row in rows for n in shown_numbers(row["src"], "What follows ")[:-1]} == pool


def test_the_same_seed_shows_the_same(bench, tmp_path):
    benches = [
        add_demonstrations(bench, Demonstrations(shots=2, seed=seed), tmp_path / name)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert benches[0].fingerprint == benches[1].fingerprint != benches[2].fingerprint
    with pytest.raises(ValueError, match="a exists already; give another --output"):
        add_demonstrations(bench, Demonstrations(shots=2), tmp_path / "a")


def test_zipf_shares_are_those_of_the_zeta_function():
    # 1 / zeta(2) = 0.6079, and a quarter and a ninth of it.
    assert shot_shares(Demonstrations(shots=3, zipf=2.0)) == pytest.approx(
        [0.60793, 0.75991, 0.82746], abs=1e-5
    )
    assert shot_shares(Demonstrations(shots=1, zipf=4.0)) == pytest.approx([0.92394], abs=1e-5)
    assert shot_shares(Demonstrations(shots=2)) == [0.0, 0.0]


def test_zipf_training_is_mostly_zero_shot(bench, tmp_path):
    shown = add_demonstrations(bench, Demonstrations(shots=5, zipf=2.0), tmp_path / "shown", ("train",))
    prompts = [row["src"] for row in rows_of(shown, "instance_level", "train")]
    shots = Counter(len(shown_numbers(prompt, "What follows ")) - 1 for prompt in prompts)
    assert set(shots) == {0, 1, 2, 3, 4, 5}
    # 250 prompts: three standard deviations are 9 %.
    assert shots[0] / len(prompts) == pytest.approx(0.61, abs=0.09)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "got shots 0"),
        ({"shots": 2, "zipf": 1.0}, "zipf is 1.0; give more than 1"),
        ({"shots": 2, "pool": 0}, "pool 0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Demonstrations(**options)


def test_the_command(bench, tmp_path):
    command = [sys.executable, ROOT / "tools/preprocess/add_demonstrations.py", "--input", bench.folder]
    environment = {"PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}"}
    for expected in (0, 2):
        result = subprocess.run(
            [*map(str, command), "--shots", "2", "--separator", r"\n\n\n", "--output", str(tmp_path / "b")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == expected, result.stderr
    assert "exists already" in result.stderr
    assert "\n\n\nInput: " in rows_of(Bench.open(tmp_path / "b"), "task_level")[0]["src"]
