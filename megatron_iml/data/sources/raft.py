"""RAFT, for evaluation only: eleven classification tasks with fifty labelled examples each.

What enters: `<folder>/<task>/train.csv` with the columns of the data, `Label` and `ID`; and `task.json`
beside it, where there is one, for the labels in their order. What leaves: one `Task` per folder.

    Sentence,Label,ID
    "we overrule it.",overruling,0
    ->  source "Does the sentence from ... ?\\nPossible labels: not overruling, overruling\\n\\n
        Sentence: we overrule it.\\nLabel:", targets ("overruling",)

`test_unlabeled.csv` is not read: its answers were never published.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.instructions import instruction_of, load_instructions
from megatron_iml.data.tables import table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import json_object, source_files

BENCHMARK = "RAFT"
LABEL = "Label"


def read(folder: Path, drops: Drops, *, instructions: str = "") -> Iterator[Task]:
    """Tasks of RAFT's data folder.

    Args:
        folder: holds one folder for each task.
        drops: where instances are counted.
        instructions: a YAML file of `task: sentence`, relative to `folder`, over those of the package.

    Raises:
        ValueError: a task without an instruction, or without the column `Label`.
    """
    sentences = load_instructions(BENCHMARK, folder, instructions)
    # Fifty rows each, and called train: they are the only ones with labels.
    for path in source_files(folder, "*/train.csv", drops):
        name = path.parent.name
        labels = _labels(path)
        instruction = f"{instruction_of(sentences, name, BENCHMARK)}\nPossible labels: {', '.join(labels)}"
        yield make_task(
            drops,
            BENCHMARK,
            name,
            "RAFT",
            partial(_instances, path, instruction, labels),
            metric="accuracy",
            data_sources=(data_source(name),),
            # Fifty rows are its whole point: what was tuned on them has no few-shot score.
            evaluation_only=True,
        )


def _labels(path: Path) -> tuple[str, ...]:
    description = path.with_name("task.json")
    if description.is_file():
        columns = json_object(description).get("label_columns", {})
        if isinstance(columns, Mapping) and isinstance(columns.get(LABEL), list):
            # In the authors' order, and with labels that none of the fifty rows has.
            return tuple(map(str, columns[LABEL]))
    # Without task.json the labels that occur must do, in alphabetical order.
    labels = {row.get(LABEL) for _, row in table_rows(path)}
    if None in labels:
        raise ValueError(f"{path}: no column `{LABEL}`; a RAFT task has one, and an ID")
    return tuple(sorted(str(label) for label in labels))


def _instances(path: Path, instruction: str, labels: tuple[str, ...], counts: TaskCounts) -> Instances:
    for number, row in table_rows(path):
        # Compared as text, as `_labels` returns them: JSON may have numbers, CSV has none.
        label = str(row.get(LABEL, ""))
        id = f"{path.parent.name}-{row.get('ID', number)}"
        if label not in labels:
            yield id, "label is not one of the task's"
            continue
        # ID is left out, since it follows the order of the rows and so could follow the label.
        fields = "\n".join(f"{name}: {text}" for name, text in row.items() if name not in (LABEL, "ID"))
        yield id, Form(f"{instruction}\n\n{fields}\n{LABEL}:", (label,), labels, instruction)
