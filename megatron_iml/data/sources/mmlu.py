"""MMLU, for evaluation only: 57 subjects, which are the parts of one task.

What enters: `<folder>/{dev,val,test}/<subject>_<part>.csv`, no header: question, four answers, the letter of
the right one. What leaves: a `Task` `mmlu__<subject>` for each subject, with the parent `mmlu`.

    "What is 1 + 1?",1,2,3,4,B
    ->  source "The following are multiple choice questions (with answers) about abstract algebra.\\n\\n
        What is 1 + 1?\\nA. 1\\nB. 2\\nC. 3\\nD. 4\\nAnswer:", targets ("B",), candidates ("A", "B", "C", "D")
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.tables import csv_records
from megatron_iml.data.text_files import source_files

BENCHMARK = "MMLU"
LETTERS = ("A", "B", "C", "D")


def read(folder: Path, drops: Drops, *, part: str = "test") -> Iterator[Task]:
    """Tasks of one part of MMLU.

    Args:
        folder: holds the folders `dev`, `val` and `test`.
        drops: where instances are counted.
        part: `test`, or `val` as the paper did for its choices.

    Raises:
        ValueError: no such part.
    """
    for path in source_files(folder / part, f"*_{part}.csv", drops):
        subject = path.stem.removesuffix(f"_{part}")
        yield make_task(
            drops,
            BENCHMARK,
            f"mmlu__{subject}",
            "MMLU",
            partial(_instances, path, subject.replace("_", " ")),
            metric="accuracy",
            data_sources=("mmlu",),
            # The paper evaluates on MMLU; training on any part of it would void the comparison.
            evaluation_only=True,
        )


def _instances(path: Path, subject: str, counts: TaskCounts) -> Instances:
    instruction = f"The following are multiple choice questions (with answers) about {subject}."
    # By record: the line of a record moves with the newlines in its cells, its place does not.
    for number, (_, record) in enumerate(csv_records(path)):
        if len(record) != 6 or record[5].strip() not in LETTERS:
            yield f"{path.stem}-{number}", "not a question, four answers and a letter"
            continue
        question, *answers, right = record
        options = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, answers, strict=True))
        # The prompt of MMLU's own evaluate.py, whose scores others quote; the answer is a letter alone.
        source = f"{instruction}\n\n{question.strip()}\n{options}\nAnswer:"
        yield f"{path.stem}-{number}", Form(source, (right.strip(),), LETTERS, instruction)
