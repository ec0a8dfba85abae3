"""UnifiedSKG: questions over tables, graphs and databases that are written out as text.

What enters: `<folder>/**/<task>_<split>.jsonl` (or .json) whose rows have `text_in`, `struct_in` and
`seq_out`. What leaves: one `Task` for each task.

    {"text_in": "who won?", "struct_in": "col : name | rank row 1 : ann | 1", "seq_out": "ann"}
    ->  source "Answer the question from the table.\\nwho won? ; structured knowledge: col : name | rank ..."

    {"text_in": "and in 2009? || who won?", ...}  (a conversation, its newest turn first)
    ->  "and in 2009? ; structured knowledge: ... ; context: who won?"

Tables lie flat: "col : a | b row 1 : 1 | 2". Where a row has `table` instead of `struct_in`, a header and
rows, it is written in that form here. Nothing is cut: a plan cuts what is too long, and counts it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.instructions import instruction_of, load_instructions
from megatron_iml.data.tables import table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_text, as_texts, source_files

BENCHMARK = "UnifiedSKG"
TURNS = " || "


def read(folder: Path, drops: Drops, *, instructions: str = "") -> Iterator[Task]:
    """Tasks of a folder of UnifiedSKG's sequences.

    Args:
        folder: anything above the files.
        drops: where instances are counted.
        instructions: a YAML file of `task: sentence`, relative to `folder`, over those of the package.

    Raises:
        ValueError: a task without an instruction; nothing matches.
    """
    sentences = load_instructions(BENCHMARK, folder, instructions)
    tasks: dict[str, list[Path]] = {}
    for path in source_files(folder, "**/*_*.json*", drops):
        # From the right: spider_dev, but also multi_woz_train.
        tasks.setdefault(path.stem.rpartition("_")[0], []).append(path)
    for name, paths in sorted(tasks.items()):
        pick = partial(_instances, paths, instruction_of(sentences, name, BENCHMARK))
        yield make_task(drops, BENCHMARK, name, "", pick, data_sources=(data_source(name),))


def linearised(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table as text: `col : a | b row 1 : 1 | 2 row 2 : 3 | 4`."""
    # TAPEX's form, which UnifiedSKG took over for every table.
    lines = ["col : " + " | ".join(map(str, header))]
    lines += [f"row {number} : " + " | ".join(map(str, row)) for number, row in enumerate(rows, start=1)]
    return " ".join(lines)


def _instances(paths: Sequence[Path], sentence: str, counts: TaskCounts) -> Instances:
    for path in paths:
        for number, row in table_rows(path):
            yield f"{path.stem}-{number}", _form(row, sentence, counts)


def _form(row: dict[str, Any], sentence: str, counts: TaskCounts) -> Form | str:
    table = row.get("table")
    # struct_in wins: its order and its cuts are UnifiedSKG's own.
    if "struct_in" not in row and isinstance(table, dict) and {"header", "rows"} <= set(table):
        row = {**row, "struct_in": linearised(table["header"], table["rows"])}
    text, knowledge = as_text(row.get("text_in", ""), counts), as_text(row.get("struct_in", ""), counts)
    # A list where several answers are right; absent is an error of the row, unlike the two inputs.
    targets = as_texts(row.get("seq_out"), counts)
    if text is None or knowledge is None or targets is None:
        return "a field is missing or not text"
    # One of the two will do: table-to-text has no question.
    if not text.strip() and not knowledge.strip():
        return "neither text nor structured knowledge"
    # Newest first in the files, and so it stays: the question that is asked comes before its context.
    newest, *history = text.split(TURNS)
    parts = [newest.strip()] if newest.strip() else []
    if knowledge.strip():
        parts.append(f"structured knowledge: {knowledge.strip()}")
    if history:
        parts.append("context: " + " | ".join(turn.strip() for turn in history))
    # By its first turn: later turns of a conversation quote earlier ones and build on their answers.
    first = (history or [newest])[-1].strip()
    return Form(f"{sentence}\n{' ; '.join(parts)}", targets, instance=f"{first}\0{knowledge.strip()}")
