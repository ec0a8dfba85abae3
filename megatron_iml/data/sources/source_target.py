"""JSON Lines of `src` and `tgt`, the form OPT-IML's own trainer read (metaseq).

What enters: `<folder>/**/<benchmark>__<category>__<task>.jsonl`; shards of a task (`00/x.jsonl`,
`01/x.jsonl`) are read one after the other. What leaves: one `Task` per file name.

    T5__Translation__wmt16__enro.jsonl   ->  benchmark "T5", category "Translation", task "wmt16__enro"
    {"src": "Is it? A:", "tgt": "Yes", "candidates": ["Yes", "No"]}

`references` (all right answers, `tgt` among them), `candidates` and `id` are optional; an empty `src` is
pretraining text. A task whose first row has candidates is scored by accuracy, any other by Rouge-L.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_iml.data.example import Example, Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.text_files import as_text, as_texts, json_lines, source_files


class TaskName(NamedTuple):
    """The three parts of a file name, in their order."""

    benchmark: str
    category: str
    task: str


def read(folder: Path, drops: Drops) -> Iterator[Task]:
    """Tasks of a folder of src/tgt files; point it at one split, for all files of a name are one task.

    Raises:
        ValueError: a name has not three parts; a line has no `src` or `tgt`.
    """
    shards: dict[str, list[Path]] = {}
    for path in source_files(folder, "**/*.jsonl", drops):
        # By name alone, over all folders: that is how metaseq shards a task.
        shards.setdefault(path.stem, []).append(path)
    for stem, paths in sorted(shards.items()):
        # Twice only: names of tasks hold "__" themselves.
        parts = stem.split("__", 2)
        if len(parts) != 3 or not all(parts):
            raise ValueError(
                f"{paths[0]}: expected a name <benchmark>__<category>__<task>.jsonl; rename the file"
            )
        name = TaskName(*parts)
        examples = partial(_examples, paths, name, drops.task(name.benchmark, name.task))
        yield Task(name.task, name.benchmark, name.category, _metric(paths[0]), examples)


def _metric(path: Path) -> Metric:
    # The metric is asked for before any row is written; the writer drops rows that do not fit it.
    # The first row speaks for all: a file of gigabytes is not read twice to find out.
    for _, row in json_lines(path):
        return "accuracy" if row.get("candidates") else "rouge_l"
    return "rouge_l"


def _examples(paths: Sequence[Path], name: TaskName, counts: TaskCounts) -> Iterator[Example]:
    # Counted over all shards: line numbers would repeat, and ids choose delimiters and held-out instances.
    index = 0
    for path in paths:
        for number, row in json_lines(path):
            counts.read += 1
            example = _example(row, f"{path}:{number}", index, name, counts)
            index += 1
            # The index counts rows that were dropped too: mending one row renames no other.
            if example is not None:
                yield example


def _example(
    row: dict[str, Any], place: str, index: int, name: TaskName, counts: TaskCounts
) -> Example | None:
    for key in ("src", "tgt"):
        if key not in row:
            raise ValueError(f"{place}: no `{key}`; got the keys {', '.join(sorted(row)) or 'none'}; add it")
    source, target = as_text(row["src"], counts), as_text(row["tgt"], counts)
    references, candidates = (
        as_texts(row.get("references", []), counts),
        as_texts(row.get("candidates", []), counts),
    )
    if source is None or target is None or references is None or candidates is None:
        counts.drop("a field is not text")
        return None
    return Example(
        # Not `or`: an id of 0 is an id.
        id=str(index if row.get("id") is None else row["id"]),
        task=name.task,
        benchmark=name.benchmark,
        category=name.category,
        source=source,
        # `tgt` first, since it is what training shows; the writer removes it from among the others.
        targets=(target, *references),
        candidates=candidates,
    )
