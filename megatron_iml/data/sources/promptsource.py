"""PromptSource: hand-written Jinja templates over the rows of a data set, one task for each data set.

What enters: `<templates>/<data set>[/<subset>]/templates.yaml` as the official repository has them, and
`<folder>/<data set>[/<subset>]/<split>.jsonl` (or .json, .csv, .tsv, .parquet) with Hugging Face's columns.
What leaves: a `Task` named `<data set>__<subset>` for every data set with both.

    template "{{question}}\\n{{choices | join(', ')}} ||| {{choices[label]}}"
    row      {"question": "Wet?", "choices": ["sea", "sun"], "label": 0}
    ->       source "Wet?\\nsea, sun", targets ("sea",)

Only templates marked `original_task` are used. Each row gets one prompt, by a template that the seed picks
among those that apply to it: N rows are N prompts however many templates there are, as in the paper. A
template that renders blank for a row does not apply to it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Example, Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.jinja_templates import Prompt, Template, draw, load_templates
from megatron_iml.data.tables import KINDS, row_key, table_rows
from megatron_iml.data.taxonomy.data_sources import data_source

BENCHMARK = "PromptSource"


def read(
    folder: Path,
    drops: Drops,
    *,
    templates: str = "../promptsource/promptsource/templates",
    row_splits: Sequence[str] = ("train", "validation"),
    prompts_per_row: int = 1,
    seed: int = 1,
) -> Iterator[Task]:
    """Tasks of all data sets that lie in the folder and have templates.

    Args:
        folder: rows, laid out as the templates are.
        drops: where instances are counted.
        templates: the templates' folder, relative to `folder`.
        row_splits: beginnings of the names of the files that are read. Not `test` unless asked: its labels
            are often -1, which a template takes for the last of its choices.
        prompts_per_row: templates that a row is shown with; 0 for every one that applies.
        seed: picks templates, and what they pick at random themselves.

    Raises:
        ValueError: no data set has both templates and rows, or a template is not Jinja.
    """
    root = folder / templates
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of templates {root}; give the option `templates`")
    found = 0
    for path in sorted(root.rglob("templates.yaml")):
        data_set = path.parent.relative_to(root)
        # Of this folder alone: a subset's rows lie below, under its own templates.
        tables = [table for table in sorted((folder / data_set).glob("*")) if table.suffix in KINDS]
        # Beginnings: large data sets come as train-00000-of-00004.parquet.
        files = [table for table in tables if table.stem.startswith(tuple(row_splits))]
        # Before the splits are looked at: rows of other splits alone are no sign of a wrong folder.
        found += bool(tables)
        if not files:
            # Templates without rows are the rule, rows that nothing reads are worth a line.
            if tables:
                drops.skip_file(folder / data_set, f"no file of the splits {', '.join(row_splits)}")
            continue
        usable = load_templates(path)
        if not usable:
            drops.skip_file(folder / data_set, "no template of the original task")
            continue
        # "__" parts data set and subset for `data_source` and for the table of categories.
        name = "__".join(data_set.parts)
        # Templates are compiled anew where rows are read: a task must be able to move to another process.
        pick = partial(_examples, files, name, path, drops.task(BENCHMARK, name), prompts_per_row, seed)
        # All: a row whose template has no candidates could not be ranked, and a task has one metric.
        ranked = all(template.ranks for template in usable)
        source = data_source(name)
        metric: Metric = "accuracy" if ranked else "rouge_l"
        yield Task(name, BENCHMARK, "", metric, pick, data_sources=(source,), parent=source)
    if not found:
        raise ValueError(f"{folder}: no data set of {root} has rows here; correct the folder or `templates`")


def _examples(
    files: Sequence[Path],
    name: str,
    template_file: Path,
    counts: TaskCounts,
    prompts_per_row: int,
    seed: int,
) -> Iterator[Example]:
    templates = load_templates(template_file)
    for path in files:
        for number, row in table_rows(path):
            place = f"{path.stem}-{number}"
            # By seed, file and line, not by a generator's state: several processes read tasks, in any order.
            prompts = _prompts(row, templates, counts, prompts_per_row or len(templates), f"{seed} {place}")
            # One read per prompt that is written, so that the account closes whatever the option.
            counts.read += max(1, len(prompts))
            if not prompts:
                counts.drop("every template is blank for the row")
            for index, prompt in enumerate(prompts):
                yield Example(
                    id=place if prompts_per_row == 1 else f"{place}-{index}",
                    task=name,
                    benchmark=BENCHMARK,
                    category="",
                    source=prompt.source,
                    targets=(prompt.target,),
                    candidates=prompt.candidates,
                    instance=row_key(row),
                )


def _prompts(
    row: dict[str, object], templates: Sequence[Template], counts: TaskCounts, wanted: int, key: str
) -> list[Prompt]:
    """The first `wanted` prompts of the templates in an order that the key gives."""
    prompts: list[Prompt] = []
    # An order and no single draw, for the next in line stands in where one renders blank.
    for template in sorted(templates, key=lambda template: draw(1 << 62, key, template.name)):
        prompt = template.render(row, key)
        if prompt is None:
            # Not a drop: the row is shown by another template, and dropped where none applies.
            counts.repaired["template blank for a row, another taken"] += 1
            continue
        prompts.append(prompt)
        if len(prompts) == wanted:
            break
    return prompts
