"""ReCross: PromptSource's and BIG-bench's prompts, rendered, with the template named in every record.

What enters: `<folder>/<data set>-<subset>/*.json`, arrays of [input, [outputs], "set|split|template|#row"].
What leaves: a `Task` of benchmark PromptSource for each folder, named `<data set>__<subset>`.

    ["Wet?", ["Yes", "yes"], "super_glue-boolq|validation|exam|#7"]
    ->  task "super_glue__boolq", source "Wet?", targets ("Yes", "yes"), instance "validation|#7"

Records of one row under several templates are one instance, so they never straddle a split.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.jinja_templates import plain_name, turned_templates
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import BYTE_ORDER_MARK, as_text, as_texts, json_value, source_files

BENCHMARK = "PromptSource"


def read(folder: Path, drops: Drops, *, templates: str = "") -> Iterator[Task]:
    """Tasks of ReCross's data folder.

    Args:
        folder: holds a folder for each data set.
        drops: where instances are counted.
        templates: folder of PromptSource's templates, relative to `folder`; records of those that ask for
            another task than their data set's are dropped, as the paper did.

    Raises:
        ValueError: a file is not JSON; nothing matches.
    """
    turned = turned_templates(folder / templates) if templates else frozenset()
    folders: dict[Path, list[Path]] = {}
    for path in source_files(folder, "*/*.json", drops):
        with path.open("rb") as file:
            # A byte order mark is no reason to pass a file over: `json_value` takes it off.
            if not file.read(64).lstrip(BYTE_ORDER_MARK + b" \t\r\n").startswith(b"["):
                # downstream_test.json: the test records once more, as JSON Lines.
                drops.skip_file(path, "not an array of records")
                continue
        folders.setdefault(path.parent, []).append(path)
    for data_folder, paths in sorted(folders.items()):
        # The first hyphen alone: in ai2_arc-ARC-Easy the rest is the subset's own.
        name = data_folder.name.replace("-", "__", 1)
        source = (data_source(name),)
        yield make_task(drops, BENCHMARK, name, "", partial(_instances, paths, turned), data_sources=source)


def _instances(paths: Sequence[Path], turned: frozenset[str], counts: TaskCounts) -> Instances:
    for path in paths:
        for number, record in enumerate(json_value(path)):
            yield f"{path.stem}-{number}", _form(record, turned, counts)


def _form(record: object, turned: frozenset[str], counts: TaskCounts) -> Form | str:
    if not isinstance(record, list) or len(record) != 3 or str(record[2]).count("|") < 3:
        return "not [input, outputs, place]"
    # A template's own name may hold "|": whatever stands between split and row is it.
    data_set, split, *template, row = str(record[2]).split("|")
    if plain_name(data_set, *template) in turned:
        return "template of another task"
    source, targets = as_text(record[0], counts), as_texts(record[1], counts)
    if source is None or targets is None:
        return "a field is not text"
    # The row and not the template: its renderings are one instance.
    return Form(source.rstrip(), targets, instance=f"{split}|{row}")
