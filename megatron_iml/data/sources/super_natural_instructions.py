"""Super-NaturalInstructions: one JSON file for each task, in every schema it is found in.

What enters: `<folder>/tasks/*.json` (or `<folder>/*.json`). What leaves: one `Task` per file, named by
the file's stem, because the numbers in the names are not unique.

    {"Definition": ["Name the capital."], "Categories": ["Misc."],
     "Instances": [{"id": "task1146-1", "input": "Togo", "output": ["Lome"]}]}
    ->  source "Instructions: Name the capital.\\nInput: Togo", targets ("Lome",)

Schemas: the final one (v2); the pre-release of 2021 (`Definition` a string, nested or several
`Categories`, no ids); derived data sets (`output` a string, keys absent); v1's `subtaskNNN` files (no
`Categories`, an `Examples` object). Nested categories "A -> B" count as B, the first one where there are
several, "Uncategorised" where there is none.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_texts, json_object, source_files, text_lines

BENCHMARK = "NIV2"


def read(
    folder: Path, drops: Drops, *, positive_examples: int = 0, task_lists: Sequence[str] = ()
) -> Iterator[Task]:
    """Tasks of a Super-NaturalInstructions folder.

    Args:
        folder: the repository or its `tasks` folder.
        drops: where instances are counted.
        positive_examples: demonstrations that follow a task's definition, separated by blank lines.
        task_lists: files of task names, one a line, relative to `folder`; only tasks they name are read, e.g.
            `splits/default/train_tasks.txt`. They may name more tasks than there are.

    Raises:
        ValueError: a file is not a task; nothing matches.
    """
    # The official repository keeps its tasks in a folder; derived data sets often lie loose.
    tasks_folder = folder / "tasks" if (folder / "tasks").is_dir() else folder
    paths = source_files(tasks_folder, "*.json", drops)
    for path in _listed(paths, [folder / name for name in task_lists], drops):
        # The category stands inside the file, so it is parsed here and again for its examples: reading twice
        # keeps memory at one file, however many tasks there are.
        content = json_object(path)
        # A stray package.json is an error and no silence: the folder may be the wrong one altogether.
        if not isinstance(content.get("Instances"), list):
            raise ValueError(
                f"{path}: no list `Instances`, so not a Super-NaturalInstructions task; remove the file"
            )
        category = _category(content)
        yield Task(
            name=path.stem,
            benchmark=BENCHMARK,
            category=category,
            # Of every task, classification included: Super-NaturalInstructions' own evaluation does the same.
            metric="rouge_l",
            examples=partial(_examples, path, category, drops.task(BENCHMARK, path.stem), positive_examples),
            data_sources=_data_sources(content),
        )


def _examples(path: Path, category: str, counts: TaskCounts, positive_examples: int) -> Iterator[Example]:
    content = json_object(path)
    instructions = "Instructions: " + _definition(path, content)
    demonstrations = _demonstrations(path, content, positive_examples)
    for index, instance in enumerate(content["Instances"]):
        counts.read += 1
        # An absent input is an empty one (derived data sets leave it out); an absent output is no example.
        if not isinstance(instance, dict) or "output" not in instance:
            counts.drop("no output")
            continue
        inputs = as_texts(instance.get("input", ""), counts)
        targets = as_texts(instance["output"], counts)
        if inputs is None or targets is None:
            counts.drop("input or output is not text")
            continue
        # Real inputs (2 % of them) have blanks around them, and the delimiter follows the last character.
        text = "\n".join(inputs).strip()
        if demonstrations:
            source = "\n\n".join([instructions, *demonstrations, f"Input: {text}"])
        else:
            source = f"{instructions}\nInput: {text}" if text else instructions
        yield Example(
            # Ids of the pre-release are absent or null; the position is as stable as the file.
            id=str(instance.get("id") or f"{path.stem}-{index}"),
            task=path.stem,
            benchmark=BENCHMARK,
            category=category,
            source=source,
            targets=targets,
            instruction=instructions,
        )


def _listed(paths: Sequence[Path], lists: Sequence[Path], drops: Drops) -> list[Path]:
    """The files that the lists name, all of them where there is no list."""
    if not lists:
        return list(paths)
    named: set[str] = set()
    # Each list against the folder on its own, so that the ledger says which list is out of date.
    for path in lists:
        names = {line.strip() for _, line in text_lines(path) if line.strip()}
        # The official lists name tasks that a partial copy lacks; nobody should have to edit them.
        if absent := names - {file.stem for file in paths}:
            drops.skip_file(path, f"names {len(absent)} of {len(names)} tasks that are not in the folder")
        named |= names
    listed = [path for path in paths if path.stem in named]
    if not listed:
        raise ValueError(f"{lists[0]}: names none of the {len(paths)} tasks in the folder; give other lists")
    return listed


def _data_sources(content: dict[str, Any]) -> tuple[str, ...]:
    sources = content.get("Source") or []
    # A text in derived data sets; several names in one text in the official ones ("wsc; enhanced_wsc").
    names = [sources] if isinstance(sources, str) else sources
    split = [part for name in names if isinstance(name, str) for part in name.split(";")]
    return tuple(sorted({data_source(part) for part in split if part.strip()}))


def _category(content: dict[str, Any]) -> str:
    categories = content.get("Categories") or "Uncategorised"
    # One category: a task in two would straddle held-out categories and those that are trained on.
    first = categories[0] if isinstance(categories, list) else categories
    # A parent such as "Question Answering" would lump categories that the splits tell apart.
    return str(first).split("->")[-1].strip()


def _definition(path: Path, content: dict[str, Any]) -> str:
    definition = content.get("Definition") or content.get("Prompt")
    if isinstance(definition, list):
        definition = "\n".join(str(part) for part in definition)
    if not isinstance(definition, str) or not definition.strip():
        raise ValueError(f"{path}: no `Definition` (a text or a list of texts); add one or remove the file")
    return definition.strip()


def _demonstrations(path: Path, content: dict[str, Any], count: int) -> list[str]:
    # v1 nests both lists of demonstrations in one object, and writes "-" for a list that is empty.
    owner = content["Examples"] if isinstance(content.get("Examples"), dict) else content
    positive = owner.get("Positive Examples")
    shown = positive[:count] if isinstance(positive, list) else []
    if not all(isinstance(item, dict) and {"input", "output"} <= set(item) for item in shown):
        raise ValueError(
            f"{path}: a positive example without input or output; repair it or ask for fewer of them"
        )
    return [f"Input: {item['input']}\nOutput: {item['output']}" for item in shown]
