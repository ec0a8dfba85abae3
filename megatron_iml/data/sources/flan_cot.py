"""FLAN's chain-of-thought files: TSV without header or quoting.

What enters: `<folder>/**/<name>_train.tsv` with exactly three columns, question, answer, reasoning. What
leaves: one `Task` named `cot_<name>` per file.

    "2 + 2?\\t4\\tTwo and two make 4.\\n"
    ->  source "Answer the following question by reasoning step by step.\\n2 + 2?"
        target "Two and two make 4. The answer is 4"

A newline inside a column is the two characters backslash and n, as FLAN's own reader takes it; quotes are
literal.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.reasoning_form import (
    BENCHMARK,
    CATEGORY,
    QUESTION_INSTRUCTION,
    reasoning_source,
    reasoning_target,
)
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import source_files, text_lines


def read(folder: Path, drops: Drops) -> Iterator[Task]:
    """Tasks of FLAN's `cot_data` folder, or of any folder above it.

    Raises:
        ValueError: no file matches; a line is not UTF-8.
    """
    for path in source_files(folder, "**/*_train.tsv", drops):
        name = "cot_" + path.name.removesuffix("_train.tsv")
        counts = drops.task(BENCHMARK, name)
        pick = partial(_examples, path, name, counts)
        # `cot_` belongs to FLAN's file and not to the data set: `data_source` takes it off.
        source = data_source(name)
        yield Task(name, BENCHMARK, CATEGORY, "rouge_l", pick, data_sources=(source,), parent=source)


def _examples(path: Path, name: str, counts: TaskCounts) -> Iterator[Example]:
    for number, line in text_lines(path):
        counts.read += 1
        # No csv module: a quotation mark is a character like any other here.
        columns = line.split("\t")
        if len(columns) != 3:
            counts.drop("not three columns")
            continue
        # After the split: an escaped newline never stands for a column's end.
        question, answer, rationale = (column.replace("\\n", "\n") for column in columns)
        if not question.strip() or not answer.strip() or not rationale.strip():
            counts.drop("blank column")
            continue
        yield Example(
            id=f"{name}-{number}",
            task=name,
            benchmark=BENCHMARK,
            category=CATEGORY,
            source=reasoning_source(question),
            targets=(reasoning_target(rationale, answer),),
            instruction=QUESTION_INSTRUCTION,
        )
