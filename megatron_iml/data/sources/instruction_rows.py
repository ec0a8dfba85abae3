"""Rows of an instruction, an input and an output: Alpaca's form, and self-instruct's seed tasks.

What enters: `<folder>/**/*.jsonl` (or .json, .csv, .parquet). What leaves: one `Task` for each file, of
benchmark "Instructions", named by the file.

    {"instruction": "Translate to French.", "input": "Hello.", "output": "Bonjour."}
    {"id": "seed_task_3", "instruction": "...", "instances": [{"input": "", "output": "..."}]}
    ->  source "Translate to French.\\nHello.", targets ("Bonjour.",)
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.tables import table_files, table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_text

BENCHMARK = "Instructions"
CATEGORY = "Open Instructions"


def read(folder: Path, drops: Drops, *, files: str = "**/*") -> Iterator[Task]:
    """Tasks of a folder of instruction files.

    Args:
        folder: anything above the files.
        drops: where instances are counted.
        files: a glob, without suffix, of the files that are meant.

    Raises:
        ValueError: nothing matches.
    """
    # A task for each file: people keep one data set of instructions in one file.
    for path in table_files(folder, files, drops):
        source = (data_source(path.stem),)
        yield make_task(drops, BENCHMARK, path.stem, CATEGORY, partial(_instances, path), data_sources=source)


def _instances(path: Path, counts: TaskCounts) -> Instances:
    for number, row in table_rows(path):
        # Alpaca's rows are their own only instance.
        nested = row.get("instances")
        for index, instance in enumerate(nested if isinstance(nested, list) else [row]):
            # Rows of one instruction stay together: the instruction is most of what they ask.
            yield f"{number}-{index}", _form(row, instance, str(number), counts)


def _form(row: dict[str, Any], instance: object, number: str, counts: TaskCounts) -> Form | str:
    if not isinstance(instance, dict):
        return "instance is not an object"
    instruction = as_text(row.get("instruction"), counts)
    text, output = as_text(instance.get("input", ""), counts), as_text(instance.get("output"), counts)
    if instruction is None or not instruction.strip() or text is None or output is None:
        return "no instruction or no output"
    source = f"{instruction.strip()}\n{text.strip()}" if text.strip() else instruction.strip()
    return Form(source, (output,), instance=number)
