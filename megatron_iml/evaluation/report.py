"""The report of an evaluation as files: `report.json` for machines, `report.md` for people.

What enters: conditions and task scores, and perhaps those of a baseline. What leaves: the two files, each
whole or absent, and plots. `report.json` holds the task scores and every average made of them; `read_report`
needs only the former, and is how an earlier evaluation becomes the baseline of a later one.

    {"format_version": 1, "conditions": {"checkpoint": ..., "split": "test", ...},
     "overall": {"mean": 0.55, "standard_error": 0.01, "count": 12},
     "levels": {"fully_held_out": {...}}, "columns": [{"level": ..., "category": ..., "mean": ...}],
     "benchmarks": {"flan": {...}}, "tasks": [{"task": ..., "level": ..., "estimate": {...}}],
     "baseline": null}
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_iml.data.files import write_atomically
from megatron_iml.evaluation.aggregate import Aggregate, Estimate, TaskScore, aggregate
from megatron_iml.evaluation.conditions import RESULT_FORMAT_VERSION, Conditions
from megatron_iml.evaluation.plots import plot_levels, plot_loss, read_losses
from megatron_iml.evaluation.tables import report_tables, to_markdown

# In every report, for its tables are read far from any documentation.
READING_NOTES = """\
Scores are percentages. A task is the mean over its examples; the same task in several benchmarks of a
category counts once, as the mean over them; a category is the mean over its tasks, a level over its
categories, and "all levels" over the category columns of all levels. No mean is weighted. After ± stands
the standard error from the sampling of examples (sample standard deviation over the root of their number,
carried through the means); it says nothing about the choice of tasks. "-" means that there are too few
examples for one.
"""


@dataclass(frozen=True)
class Report:
    """An evaluation's conditions and averages."""

    conditions: Conditions
    scores: Aggregate


def write_report(folder: Path, report: Report, baseline: Report | None, metrics: Path | None) -> None:
    """Write `report.json`, `report.md` and `levels.png`, and `loss.png` if metrics.jsonl has a loss."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_levels(folder / "levels.png", report.scores, None if baseline is None else baseline.scores)
    # A run that died before its first step leaves an empty file, which must not cost hours of evaluation.
    if losses := read_losses(metrics) if metrics is not None else {}:
        plot_loss(folder / "loss.png", losses)
    # The plots are there before what links to them; report.md, which people open, comes last.
    content = {**_to_json(report), "baseline": None if baseline is None else _to_json(baseline)}
    write_atomically(folder / "report.json", orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomically(folder / "report.md", report_markdown(report, baseline, has_loss=bool(losses)).encode())


def read_report(folder: Path) -> Report:
    """The report that `write_report` left in a folder.

    Raises FileNotFoundError if there is none, ValueError if it is of another format version.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: a baseline is the output folder of an earlier evaluation")
    content = orjson.loads(path.read_bytes())
    if content["format_version"] != RESULT_FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content['format_version']}, this version reads "
            f"{RESULT_FORMAT_VERSION}; evaluate again"
        )
    # Averages are made anew: those in the file may come from an older rule.
    # A field that one of two versions lacks is a TypeError here: raise the version with every change.
    tasks = [TaskScore(**{**task, "estimate": Estimate(**task["estimate"])}) for task in content["tasks"]]
    return Report(Conditions(**content["conditions"]), aggregate(tasks))


def report_markdown(report: Report, baseline: Report | None, *, has_loss: bool) -> str:
    """The whole of `report.md`."""
    # Every condition, in the order of the class: a number without them is worth nothing a year later.
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in asdict(report.conditions).items()]
    parts = [
        f"# Evaluation of {report.conditions.checkpoint}",
        "\n".join(["| condition | value |", "| --- | --- |", *rows]),
    ]
    if baseline is not None:
        theirs = baseline.conditions
        parts.append(
            f"Baseline: {theirs.checkpoint}, fingerprint {theirs.checkpoint_fingerprint}, "
            f"inference prefix {theirs.inference_prefix}."
        )
    parts.append("![Scores by level](levels.png)")
    if has_loss:
        parts.append("![Training loss](loss.png)")
    tables = report_tables(report.scores, None if baseline is None else baseline.scores)
    return "\n\n".join([*parts, *map(to_markdown, tables), READING_NOTES])


def _to_json(report: Report) -> dict[str, Any]:
    scores = report.scores
    return {
        "format_version": RESULT_FORMAT_VERSION,
        "conditions": asdict(report.conditions),
        "overall": asdict(scores.overall),
        "levels": {level: asdict(estimate) for level, estimate in scores.levels.items()},
        "columns": [
            {"level": column.level, "category": column.category, **asdict(estimate)}
            for column, estimate in scores.columns.items()
        ],
        "benchmarks": {name: asdict(estimate) for name, estimate in scores.benchmarks.items()},
        "tasks": [asdict(task) for task in scores.tasks],
    }
