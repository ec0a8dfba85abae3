"""The single-level taxonomy: every task belongs to exactly one category, whatever its benchmark calls it.

What enters: tasks under their benchmarks' own labels, and tables (`categories.yaml`, and one of the
user's own where a bench config names it). What leaves: the same tasks under our categories.

    Question Answering: {NIV2: [Question Answering], PromptSource: [race, super_glue__boolq]}
    ->  "Question Answering": task002_quoref of NIV2 (by label), race__high (by data set), super_glue__boolq

A benchmark that no table mentions keeps its own labels, so a new benchmark needs no table to begin with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Example, Task
from megatron_iml.data.text_files import yaml_mapping

TABLE = Path(__file__).with_name("categories.yaml")


@dataclass(frozen=True)
class Categories:
    """The table, turned round."""

    names: frozenset[str]
    labels: Mapping[tuple[str, str], str]
    """(benchmark, task name or label) -> category."""

    def find(self, task: Task) -> str | None:
        """Category of a task: by its name, its data set, its label; None where its benchmark has no such."""
        data_set = task.name.split("__")[0]
        # The finest first: one odd task of a data set, or one data set of a label, can be put elsewhere.
        for key in (task.name, data_set, task.category):
            if (task.benchmark, key) in self.labels:
                return self.labels[task.benchmark, key]
        # File names hold underscores where a category has blanks.
        label = task.category.replace("_", " ")
        if label in self.names:
            return label
        known = {benchmark for benchmark, _ in self.labels}
        # None is for `categorise` to refuse: a new label in a known benchmark is mostly a misspelt old one.
        return task.category if task.benchmark not in known else None


def load_categories(*own: Path) -> Categories:
    """The package's table, and over it those of the user.

    Raises:
        ValueError: a table gives one label two categories, or has not the form of `categories.yaml`.
    """
    names: set[str] = set()
    labels: dict[tuple[str, str], str] = {}
    # Later over earlier: a user moves a label by naming it again, which within one table is an error.
    for path in (TABLE, *own):
        table = _table(path)
        names |= set(table.values())
        labels |= table
    return Categories(frozenset(names), labels)


def categorise(tasks: Sequence[Task], categories: Categories) -> list[Task]:
    """The tasks under their categories.

    Raises:
        ValueError: tasks of a benchmark of the table that no line of it fits.
    """
    found = [categories.find(task) for task in tasks]
    orphans = [
        f"{task.benchmark}: {task.name}" for task, name in zip(tasks, found, strict=True) if name is None
    ]
    # All at once, the first five by name: a new benchmark has dozens.
    if orphans:
        raise ValueError(
            f"no category for {len(orphans)} tasks, {'; '.join(orphans[:5])}; write a file such as "
            "`Question Answering: {CrossFit: [my_task]}` and name it as `categories` in the bench config"
        )
    return [
        task if task.category == name else _moved(task, name)
        for task, name in zip(tasks, found, strict=True)
        if name is not None
    ]


def _moved(task: Task, category: str) -> Task:
    # Its examples too bear the category, and they are not read yet.
    return replace(task, category=category, examples=partial(_examples, task, category))


def _examples(task: Task, category: str) -> Iterator[Example]:
    for example in task.examples():
        yield replace(example, category=category)


def _table(path: Path) -> dict[tuple[str, str], str]:
    labels: dict[tuple[str, str], str] = {}
    for category, benchmarks in yaml_mapping(path).items():
        if not isinstance(benchmarks, dict) or not benchmarks:
            raise ValueError(f"{path}: {category!r} has {benchmarks!r}; give benchmarks with lists of labels")
        for benchmark, names in benchmarks.items():
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{path}: {category}: {benchmark} has {names!r}; give a list of labels")
            for name in names:
                other = labels.setdefault((benchmark, name), category)
                if other != category or names.count(name) > 1:
                    raise ValueError(
                        f"{path}: {benchmark} {name!r} stands under {other!r} and {category!r}; keep one"
                    )
    return labels
