"""FLAN: templates over the rows of a data set, with its options spelt out.

What enters: FLAN's own `templates.py` (the literal `PATTERNS`) or the same as JSON, and rows with the fields
that the templates name, `<folder>/<task>.jsonl` or `<folder>/<task>/<split>.jsonl` (or another table). What
leaves: one `Task` per data set.

    template ("{premise}\\n\\nDoes this follow: {hypothesis}\\n{options_}", "{answer}")
    row      {"premise": "It rains.", "hypothesis": "It is wet.", "options": ["yes", "no"], "answer": "yes"}
    ->       source "It rains.\\n\\nDoes this follow: It is wet.\\nOPTIONS:\\n- yes\\n- no", targets ("yes",)

A task's usual target is the one that most of its templates have; a template with another turns the task
round ("Write an article about these highlights") and is dropped, as OPT-IML did. Rows choose their template
by the seed. A task of the templates may have parts (anli: anli_r1, anli_r2): the file's name says which.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from megatron_iml.data.example import Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.sources.jinja_templates import draw
from megatron_iml.data.tables import row_key, table_files, table_rows
from megatron_iml.data.taxonomy.data_sources import data_source
from megatron_iml.data.text_files import as_text, as_texts, json_object

BENCHMARK = "FLAN"
# FLAN's words for its label numbers, its capitals and its order: an index into them is the label.
THREE_WAY = ("Yes", "It's impossible to say", "No")
TWO_WAY = ("no", "yes")
# What FLAN shows for the label numbers of data sets whose rows come without `options` and `answer`.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "anli": THREE_WAY,
    "bool_q": TWO_WAY,
    "cb": ("Yes", "No", "It's impossible to say"),
    "cola": ("unacceptable", "acceptable"),
    "glue_mrpc": TWO_WAY,
    "glue_qqp": TWO_WAY,
    "imdb_reviews": ("negative", "positive"),
    "mnli": THREE_WAY,
    "multirc": TWO_WAY,
    "paws_wiki": TWO_WAY,
    "qnli": ("yes", "no"),
    "rte": ("yes", "no"),
    "snli": THREE_WAY,
    "sst2": ("negative", "positive"),
    "wic": TWO_WAY,
    "wnli": TWO_WAY,
    "wsc": TWO_WAY,
    "yelp_polarity_reviews": ("negative", "positive"),
}


class Pattern(NamedTuple):
    """A template: both sides with `{field}` slots."""

    source: str
    target: str


def read(folder: Path, drops: Drops, *, templates: str = "../templates.py", seed: int = 1) -> Iterator[Task]:
    """Tasks of all data sets with rows.

    Args:
        folder: rows; the path of a file, up to its first part, names the task.
        drops: where instances are counted.
        templates: FLAN's `flan/templates.py`, or JSON of the same, relative to `folder`.
        seed: picks a template for each row.

    Raises:
        ValueError: rows of a task that has no templates; templates that cannot be read.
    """
    patterns = load_patterns(folder / templates)
    files: dict[str, list[Path]] = {}
    for path in table_files(folder, "**/*", drops):
        relative = path.relative_to(folder)
        files.setdefault(relative.parts[0] if len(relative.parts) > 1 else path.stem, []).append(path)
    # A task of its own for each name, though parts share templates: anli_r1 and anli_r2 are scored apart.
    for name, paths in sorted(files.items()):
        fitting = [task for task in patterns if name == task or name.startswith(task + "_")]
        if not fitting:
            raise ValueError(
                f"{paths[0]}: FLAN has no templates of a task {name!r}; rename or remove the file"
            )
        task = max(fitting, key=len)
        pick = partial(_instances, paths, task, straight(patterns[task]), seed)
        # Of the templates alone: what the rows hold is not known until they are read.
        metric = _metric(straight(patterns[task]))
        yield make_task(drops, BENCHMARK, name, task, pick, metric=metric, data_sources=(data_source(task),))


def load_patterns(path: Path) -> Mapping[str, list[Pattern]]:
    """Templates by task, from FLAN's Python file (whose literal is read, never run) or from JSON.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no literal `PATTERNS` of pairs of texts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no templates {path}; give the option `templates`")
    try:
        # literal_eval takes no calls and no names: a file of templates from elsewhere runs nothing.
        found = json_object(path) if path.suffix == ".json" else _literal(path)
        return {
            task: [Pattern(str(source), str(target)) for source, target in pairs]
            for task, pairs in found.items()
        }
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no literal PATTERNS = {{task: [(input, target), ...]}} ({error})"
        ) from error


def straight(patterns: Sequence[Pattern]) -> list[Pattern]:
    """Templates that ask for what most of a task's templates ask for."""
    usual, _ = Counter(pattern.target for pattern in patterns).most_common(1)[0]
    return [pattern for pattern in patterns if pattern.target == usual]


def _metric(patterns: Sequence[Pattern]) -> Metric:
    # Where every prompt shows its options, the answer is one of them.
    ranked = all("{options_}" in pattern.source and pattern.target == "{answer}" for pattern in patterns)
    return "accuracy" if ranked else "rouge_l"


def _literal(path: Path) -> dict[str, list[tuple[str, str]]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PATTERNS":
            return dict(ast.literal_eval(node.value))
    raise ValueError("no assignment to PATTERNS")


def _instances(
    paths: Sequence[Path], task: str, patterns: Sequence[Pattern], seed: int, counts: TaskCounts
) -> Instances:
    for path in paths:
        for number, row in table_rows(path):
            id = f"{path.stem}-{number}"
            # By file and line, so that the same row has the same template in every run.
            pattern = patterns[draw(len(patterns), str(seed), id)]
            yield id, _form(_answered(row, task), pattern, row_key(row), counts)


def _answered(row: dict[str, Any], task: str) -> dict[str, Any]:
    """A row of label numbers with the words that FLAN has for them."""
    options, label = OPTIONS.get(task, ()), row.get("label")
    # type and not isinstance: True is no label. A row that brings its answer needs no words of ours.
    if "answer" in row or type(label) is not int or not 0 <= label < len(options):
        return row
    return {**row, "options": list(options), "answer": options[label]}


def _form(row: dict[str, Any], pattern: Pattern, instance: str, counts: TaskCounts) -> Form | str:
    options = as_texts(row.get("options", []), counts)
    if options is None:
        return "options are not texts"
    # FLAN's own layout. A row without options leaves the slot empty, and is dropped where a template has one.
    listed = "OPTIONS:\n" + "\n".join(f"- {option}" for option in options)
    # ReCoRD's templates have a name of their own for it.
    fields = {"options_": listed, "options_str": listed} if options else {}
    # Only what this template names: a row may lack what other templates show.
    for _, field, _, _ in Formatter().parse(pattern.source + pattern.target):
        if field is None or field in fields:
            continue
        text = as_text(row.get(field), counts)
        if text is None or not text.strip():
            return f"no text for the field {field} of its template"
        fields[field] = text
    source, target = pattern.source.format_map(fields), pattern.target.format_map(fields)
    return Form(source, (target,), options, instance=instance)
