"""FLAN's chain-of-thought files and GSM8K: both in the form of OPT-IML's reasoning tasks."""

import json

import pytest

from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources import flan_cot, grade_school_math

SENTENCE = "Answer the following question by reasoning step by step.\n"


def flan(tmp_path, name: str, content: str):
    (tmp_path / name).write_bytes(content.encode())
    drops = Drops()
    (task,) = flan_cot.read(tmp_path, drops)
    return task, list(task.examples()), drops


def test_flan_columns_become_the_reasoning_form(tmp_path):
    task, examples, drops = flan(
        tmp_path,
        "qasc_train.tsv",
        'What "now"?\\nOptions:\\n- a\\n- b\ta\tFirst.\\nSo a.\n2 + 2?\t4\tTwo twos.\n',
    )
    assert (task.name, task.benchmark, task.category, task.metric) == (
        "cot_qasc",
        "Reasoning",
        "Reasoning",
        "rouge_l",
    )
    assert [example.id for example in examples] == ["cot_qasc-1", "cot_qasc-2"]
    assert examples[0].source == SENTENCE + 'What "now"?\nOptions:\n- a\n- b'
    assert examples[0].targets == ("First.\nSo a. The answer is a",)
    assert examples[1].targets == ("Two twos. The answer is 4",)
    assert drops.task("Reasoning", "cot_qasc").read == 2


def test_flan_line_separators_inside_a_question_do_not_break_it(tmp_path):
    _, examples, drops = flan(tmp_path, "gsm8k_train.tsv", "a\u2028b\x85c\t1\tSo.\nd\t2\tThus.\n")
    assert examples[0].source == SENTENCE + "a\u2028b\x85c"
    assert drops.task("Reasoning", "cot_gsm8k").read == 2


def test_flan_malformed_lines_are_dropped_with_a_reason(tmp_path):
    _, examples, drops = flan(tmp_path, "ecqa_train.tsv", "q\ta\nq\ta\tr\tmore\nq\t \tr\nq\ta\tr\n")
    assert [example.id for example in examples] == ["cot_ecqa-4"]
    counts = drops.task("Reasoning", "cot_ecqa")
    assert counts.read == 4
    assert counts.dropped == {"not three columns": 2, "blank column": 1}


def gsm8k(tmp_path, rows, part="train"):
    folder = tmp_path / "grade_school_math" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_gsm8k_annotations_go_and_the_answer_ends_the_target(tmp_path):
    gsm8k(
        tmp_path,
        [
            {
                "question": "How many? ",
                "answer": "48/2 = <<48/2=24>>24 clips.\n24*50=$<<24*50=1200>>1,200.\n#### 1,200",
            },
            {"question": "How cold?", "answer": "It fell by 5.\n#### -5"},
        ],
    )
    drops = Drops()
    (task,) = grade_school_math.read(tmp_path, drops)
    first, second = task.examples()
    assert (task.name, task.category, first.id) == ("gsm8k_train", "Reasoning", "train-1")
    assert first.source == SENTENCE + "How many?"
    assert first.targets == ("48/2 = 24 clips.\n24*50=$1,200. The answer is 1,200",)
    assert second.targets == ("It fell by 5. The answer is -5",)


def test_gsm8k_test_part_is_another_task_and_read_only_when_asked(tmp_path):
    gsm8k(tmp_path, [{"question": "a", "answer": "b #### 1"}])
    gsm8k(tmp_path, [{"question": "c", "answer": "d #### 2"}], part="test")
    assert [task.name for task in grade_school_math.read(tmp_path, Drops())] == ["gsm8k_train"]
    both = list(grade_school_math.read(tmp_path, Drops(), parts=["train", "test"]))
    assert [task.name for task in both] == ["gsm8k_train", "gsm8k_test"]
    assert [example.source for task in both for example in task.examples()] == [
        SENTENCE + "a",
        SENTENCE + "c",
    ]


def test_gsm8k_rows_without_an_answer_are_dropped_with_a_reason(tmp_path):
    gsm8k(
        tmp_path,
        [
            {"question": "a", "answer": "no mark"},
            {"question": "b"},
            {"question": "c", "answer": "x ####  "},
            {},
        ],
    )
    drops = Drops()
    (task,) = grade_school_math.read(tmp_path, drops)
    assert list(task.examples()) == []
    counts = drops.task("Reasoning", "gsm8k_train")
    assert counts.read == 4
    assert counts.dropped == {"no answer after ####": 2, "question or answer is not text": 2}


def test_gsm8k_two_files_of_a_part_are_an_error(tmp_path):
    gsm8k(tmp_path / "one", [])
    gsm8k(tmp_path / "one", [{"question": "a", "answer": "b #### 1"}])
    gsm8k(tmp_path / "two", [{"question": "a", "answer": "b #### 1"}])
    with pytest.raises(ValueError, match="2 files train.jsonl"):
        list(grade_school_math.read(tmp_path, Drops()))
