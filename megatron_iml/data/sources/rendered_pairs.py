"""Prompts that others have rendered: JSON Lines of a prompt and its completion, a file for each template.

What enters: `<folder>/**/<data set>_<subset>_<template>.jsonl` as the T0 samples of self-instruct lie, or
lines of P3 and of FLAN's collection. What leaves: one `Task` for each data set, whatever its templates.

    qasc_is_correct_1.jsonl  {"prompt": "Is rain wet?\\n", "completion": "Yes<|endoftext|>"}
    qasc_is_correct_2.jsonl  ...
    ->  task "qasc" of PromptSource: source "Is rain wet?", targets ("Yes",), and the rows of both files

The literal text `<|endoftext|>` at the end of a completion is not part of an answer. Consecutive rows with
one prompt are one example with several references.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.jinja_templates import plain_name, turned_templates
from megatron_iml.data.taxonomy.categories import load_categories
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_text, json_lines, source_files

END_OF_TEXT = "<|endoftext|>"
# Names of the two fields: self-instruct's T0, P3, FLAN's collection, ReCross's downstream files. P3 before
# FLAN: its rows have `inputs` and `targets` as well, which are lists of ids.
FIELDS = (
    ("prompt", "completion"),
    ("inputs_pretokenized", "targets_pretokenized"),
    ("inputs", "targets"),
    ("input_text", "output_text"),
)


def read(
    folder: Path, drops: Drops, *, benchmark: str = "PromptSource", templates: str = ""
) -> Iterator[Task]:
    """Tasks of a folder of rendered prompts.

    Args:
        folder: anything above the files.
        drops: where instances are counted.
        benchmark: whose data sets of `categories.yaml` the files' names begin with.
        templates: folder of PromptSource's templates, relative to `folder`; files of those that ask for
            another task than their data set's are left out, as the paper did.

    Raises:
        ValueError: a file whose name begins with no data set of the benchmark; a line without both fields.
    """
    # File names were made from data sets by replacing whatever is no letter, so both are compared so.
    names = {plain_name(name): name for owner, name in load_categories().labels if owner == benchmark}
    files: dict[str, list[Path]] = {}
    turned = turned_templates(folder / templates) if templates else frozenset()
    for path in source_files(folder, "**/*.jsonl", drops):
        if plain_name(path.stem) in turned:
            drops.skip_file(path, "template of another task")
            continue
        files.setdefault(_data_set(path, names, benchmark), []).append(path)
    for name, paths in sorted(files.items()):
        source = (data_source(name),)
        yield make_task(drops, benchmark, name, "", partial(_instances, paths), data_sources=source)


def _data_set(path: Path, names: dict[str, str], benchmark: str) -> str:
    stem = plain_name(path.stem)
    # The longest: super_glue__boolq and not another data set of its collection.
    fitting = [name for name in names if stem == name or stem.startswith(name + "_")]
    if not fitting:
        raise ValueError(
            f"{path}: the name begins with no data set of {benchmark} in taxonomy/categories.yaml; "
            "rename the file, or add its data set"
        )
    return names[max(fitting, key=len)]


def _instances(paths: Sequence[Path], counts: TaskCounts) -> Instances:
    for path in paths:
        waiting: tuple[str, Form] | None = None
        for number, row in json_lines(path):
            source, target = _fields(f"{path}:{number}", row, counts)
            if source is None or target is None:
                yield f"{path.stem}-{number}", "a field is not text"
                continue
            # rstrip before: blanks may follow the mark.
            target = target.rstrip().removesuffix(END_OF_TEXT)
            # Held back by one row, since only the next one tells whether there are more references.
            if waiting is not None and waiting[1].source == source.rstrip():
                waiting = waiting[0], waiting[1]._replace(targets=(*waiting[1].targets, target))
                # A line read is a line accounted for, and this one becomes no example of its own.
                yield waiting[0], "one more reference of the row before"
                continue
            if waiting is not None:
                yield waiting
            # Templates were rendered over the same rows: line 7 of each file is one instance, in one split.
            waiting = f"{path.stem}-{number}", Form(source.rstrip(), (target,), instance=str(number))
        if waiting is not None:
            yield waiting


def _fields(place: str, row: dict[str, object], counts: TaskCounts) -> tuple[str | None, str | None]:
    for source, target in FIELDS:
        if source in row and target in row:
            return as_text(row[source], counts), as_text(row[target], counts)
    known = ", ".join(" and ".join(pair) for pair in FIELDS)
    raise ValueError(f"{place}: got the keys {', '.join(sorted(row)) or 'none'}; give {known}")
