"""Tables of a report, once as cells, shown as Markdown or on the console.

What enters: the averages of a model and perhaps of a baseline. What leaves: four tables (levels, categories,
benchmarks, tasks), each a header and rows of text.

    | level          | parts | score      | baseline   | difference |
    | fully held out |     5 | 48.3 ± 1.2 | 39.8 ± 1.1 |       +8.5 |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table as RichTable
from rich.text import Text

from megatron_iml.evaluation.aggregate import Aggregate, Estimate

Rows = Mapping[tuple[str, ...], Estimate]


@dataclass(frozen=True)
class Table:
    """Cells of one table; the first `num_labels` columns are words, the others are numbers."""

    title: str
    header: tuple[str, ...]
    num_labels: int
    # Text already: Markdown and the console then agree to the last digit.
    rows: tuple[tuple[str, ...], ...]


def report_tables(scores: Aggregate, baseline: Aggregate | None) -> list[Table]:
    """Levels, categories, benchmarks and tasks; two more columns speak of the baseline if there is one."""
    return [
        _table("Levels", ("level",), "categories", _level_rows, scores, baseline),
        _table("Categories", ("level", "category"), "tasks", _category_rows, scores, baseline),
        _table("Benchmarks", ("benchmark",), "tasks", _benchmark_rows, scores, baseline),
        _tasks_table(scores, baseline),
    ]


def to_markdown(table: Table) -> str:
    """A Markdown section with the table; numbers are aligned right."""
    align = ["---"] * table.num_labels + ["---:"] * (len(table.header) - table.num_labels)
    lines = [table.header, align, *([_escaped(cell) for cell in row] for row in table.rows)]
    return f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_rich(table: Table) -> RichTable:
    """The table for a console."""
    shown = RichTable(title=table.title, title_justify="left")
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="left" if index < table.num_labels else "right")
    for row in table.rows:
        # As text: a task name with brackets is no style.
        shown.add_row(*map(Text, row))
    return shown


def words(level: str) -> str:
    """A level's name for people: `fully_held_out` -> `fully held out`."""
    return level.replace("_", " ")


def _level_rows(scores: Aggregate) -> Rows:
    # The sum line stands in the same table, last, so that no one takes it for a level.
    named = {words(level): estimate for level, estimate in scores.levels.items()}
    return {(name,): estimate for name, estimate in (named | {"all levels": scores.overall}).items()}


def _category_rows(scores: Aggregate) -> Rows:
    return {(words(column.level), column.category): e for column, e in scores.columns.items()}


def _benchmark_rows(scores: Aggregate) -> Rows:
    return {(name,): estimate for name, estimate in scores.benchmarks.items()}


def _task_rows(scores: Aggregate) -> Rows:
    return {
        (words(task.level), task.category, task.task, task.benchmark, task.metric): task.estimate
        for task in scores.tasks
    }


def _tasks_table(scores: Aggregate, baseline: Aggregate | None) -> Table:
    labels = ("level", "category", "task", "benchmark", "metric")
    table = _table("Tasks", labels, "examples", _task_rows, scores, baseline)
    # Both say how far a score can be trusted: prompts cut on the left, answers that hit the length limit.
    rows = (
        (*row, str(task.cut_prompts), str(task.unfinished_answers))
        for row, task in zip(table.rows, scores.tasks, strict=True)
    )
    return replace(table, header=(*table.header, "cut prompts", "unfinished answers"), rows=tuple(rows))


def _table(
    title: str,
    labels: tuple[str, ...],
    count_name: str,
    rows_of: Callable[[Aggregate], Rows],
    scores: Aggregate,
    baseline: Aggregate | None,
) -> Table:
    ours = rows_of(scores)
    header = (*labels, count_name, "score")
    rows = [(*label, str(estimate.count), _percent(estimate)) for label, estimate in ours.items()]
    if baseline is not None:
        theirs = rows_of(baseline)
        header = (*header, "baseline", "difference")
        # Every label of ours is one of theirs: `check_comparable` wants the same bench, split and examples.
        rows = [(*row, *_against(ours[label], theirs[label])) for row, label in zip(rows, ours, strict=True)]
    return Table(title, header, len(labels), tuple(rows))


def _against(ours: Estimate, theirs: Estimate) -> Sequence[str]:
    return _percent(theirs), f"{100 * (ours.mean - theirs.mean):+.1f}"


def _percent(estimate: Estimate) -> str:
    error = "-" if estimate.standard_error is None else f"{100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.mean:.1f} ± {error}"


def _escaped(cell: str) -> str:
    # A bar in a task name would end its cell.
    return cell.replace("|", "\\|")
