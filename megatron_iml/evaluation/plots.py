"""Plots: scores per level beside the baseline, and the loss of a training run.

What enters: averages, or a `metrics.jsonl` with rows {"step": 1, "loss": 2.31, ...}. What leaves: PNG files.
Figures are built without pyplot, which keeps a global list of them and looks for a display.
"""

from pathlib import Path

import orjson
from matplotlib.figure import Figure

from megatron_iml.data.bench.splits import LEVELS
from megatron_iml.evaluation.aggregate import Aggregate, Estimate
from megatron_iml.evaluation.tables import words


def plot_levels(path: Path, scores: Aggregate, baseline: Aggregate | None) -> None:
    """Write a bar chart of the levels' scores in per cent; whiskers are one standard error."""
    levels = [level for level in LEVELS if level in scores.levels]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    models = [("model", scores)] if baseline is None else [("baseline", baseline), ("model", scores)]
    width = 0.8 / len(models)
    for number, (name, aggregate) in enumerate(models):
        estimates = [aggregate.levels[level] for level in levels]
        left = [at + (number - (len(models) - 1) / 2) * width for at in range(len(levels))]
        axes.bar(
            left,
            [100 * estimate.mean for estimate in estimates],
            width=0.9 * width,
            yerr=[_whisker(estimate) for estimate in estimates],
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(levels)), [words(level) for level in levels])
    axes.set_ylim(0, 100)
    axes.set_ylabel("score (%)")
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_loss(path: Path, metrics: Path) -> None:
    """Write the training loss over steps; a step that stands twice (a resumed run) keeps its last value.

    Raises FileNotFoundError without the file, ValueError if no row has a loss.
    """
    if not metrics.is_file():
        raise FileNotFoundError(f"no {metrics}: pass the metrics.jsonl of a training run's output directory")
    loss_at: dict[int, float] = {}
    with metrics.open("rb") as lines:
        for line in lines:
            # A run that is under way, or was killed, may have half a last line: no reason to lose the report.
            if not line.endswith(b"\n"):
                break
            row = orjson.loads(line)
            if "loss" in row:
                loss_at[row["step"]] = row["loss"]
    if not loss_at:
        raise ValueError(f"{metrics} has no row with a loss; it must hold the metrics of at least one step")
    steps = sorted(loss_at)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [loss_at[step] for step in steps])
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    figure.savefig(path, dpi=150)


def _whisker(estimate: Estimate) -> float:
    return 0.0 if estimate.standard_error is None else 100 * estimate.standard_error
