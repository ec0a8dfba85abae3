"""The level of generalisation of every task, and the promise that no data source is on both sides.

What enters: a splits file (`splits.py`) and all tasks of a bench. What leaves: a level for each.

    held_out_categories: [Cause Effect Classification], held_out_data_sources: [race]
    copa      Cause Effect Classification  copa   fully_held_out
    race      Question Answering           race   partially_supervised
    squad     Question Answering           squad  fully_supervised
    task1_why Question Generation          copa   None: it would train on the sentences of a held-out task

All tasks at once, since the level of one depends on the data sources of the others.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_iml.data.bench.splits import Level, Splits, near
from megatron_iml.data.example import Task
from megatron_iml.data.taxonomy.data_sources import data_source


def missing_names(splits: Splits, tasks: Sequence[Task]) -> list[str]:
    """Names of a splits file that no task answers to.

    Raises:
        ValueError: there are some and the file does not allow it, or none of its names is there.
    """
    categories = sorted({task.category for task in tasks})
    names = sorted({name for task in tasks for name in (task.name, task.parent) if name})
    sources = sorted({source for task in tasks for source in task.data_sources})
    missing = [
        (kind, name, known)
        for wanted, known, kind in (
            (splits.held_out_categories, categories, "category"),
            (splits.held_out_tasks, names, "task"),
            ([data_source(name) for name in splits.held_out_data_sources], sources, "data source"),
            ([data_source(name) for name in splits.shared_data_sources], sources, "data source"),
            (splits.max_examples_of_benchmark, sorted({task.benchmark for task in tasks}), "benchmark"),
        )
        # Only tasks have patterns: they are many, and those of one data set have names alike.
        for name in wanted
        if not any(fnmatchcase(each, name) if kind == "task" else each == name for each in known)
    ]
    held_out = splits.held_out_categories + splits.held_out_tasks + splits.held_out_data_sources
    # Not one name there: the file is one for other sources, and nothing would be held out.
    all_names = len(held_out) + len(splits.shared_data_sources) + len(splits.max_examples_of_benchmark)
    if missing and (splits.missing_names == "refuse" or len(missing) == all_names):
        kind, name, known = missing[0]
        raise ValueError(f"splits: no {kind} {name!r} in the sources; {near(name, known)}")
    return [f"{kind} {name}" for kind, name, _ in missing]


def levels_of(splits: Splits, tasks: Sequence[Task]) -> list[Level | None]:
    """Level of each task; None for one that shares a data source with a held-out task and is not held out.

    Raises:
        ValueError: a held-out name does not exist; a task held out by name leaves its category nothing to
            train on.
    """
    # For what it raises; build_bench.py asks again for what it returns.
    missing_names(splits, tasks)
    named = [_named_level(splits, task) for task in tasks]
    held_out = {
        source
        for task, level in zip(tasks, named, strict=True)
        # What is only ever evaluated is expected to overlap: its own papers chose it knowing what it is from.
        if level != "fully_supervised" and not task.evaluation_only
        for source in task.data_sources
    } - {data_source(name) for name in splits.shared_data_sources}
    # Only what would be trained on is lost: a held-out task may share its source with another one.
    levels = [
        None if level == "fully_supervised" and not held_out.isdisjoint(task.data_sources) else level
        for task, level in zip(tasks, named, strict=True)
    ]
    # Otherwise a report would show as partially supervised what no training task has prepared.
    trained = {
        task.category for task, level in zip(tasks, levels, strict=True) if level == "fully_supervised"
    }
    for task, level in zip(tasks, levels, strict=True):
        if level == "partially_supervised" and task.category not in trained and not task.evaluation_only:
            raise ValueError(
                f"splits: all tasks of category {task.category!r} are held out, so {task.name!r} is not "
                "partially supervised; hold the category out instead, or leave it a task to train on"
            )
    return levels


def _named_level(splits: Splits, task: Task) -> Level:
    # Category first: a task held out twice over belongs to the stricter level.
    if task.category in splits.held_out_categories:
        return "fully_held_out"
    named = any(
        fnmatchcase(name, pattern)
        for name in (task.name, task.parent)
        if name
        for pattern in splits.held_out_tasks
    )
    sources = {data_source(name) for name in splits.held_out_data_sources}
    if named or task.evaluation_only or not sources.isdisjoint(task.data_sources):
        return "partially_supervised"
    return "fully_supervised"
