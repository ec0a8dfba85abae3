"""Plots: scores per level beside the baseline, and the loss of a training run.

What enters: averages, or a `metrics.jsonl` with rows {"step": 1, "loss": 2.31, ...}. What leaves: PNG files.
Figures are built without pyplot, which keeps a global list of them and looks for a display.
"""

from collections.abc import Mapping
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
    # In units of the distance between two levels; what is left parts the groups.
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
    # From 0 to 100 in every report: bars of two evaluations can be compared by eye.
    axes.set_ylim(0, 100)
    axes.set_ylabel("score (%)")
    axes.legend()
    figure.savefig(path, dpi=150)


def read_losses(metrics: Path) -> dict[int, float]:
    """Training loss by step, the last value where a step stands twice; empty before a run's first step."""
    loss_at: dict[int, float] = {}
    with metrics.open("rb") as lines:
        for line in lines:
            # A run that is under way, or was killed, may have half a last line: no reason to lose the report.
            if not line.endswith(b"\n"):
                break
            row = orjson.loads(line)
            # Rows of validation losses have other keys.
            if "loss" in row:
                loss_at[row["step"]] = row["loss"]
    return loss_at


def plot_loss(path: Path, loss_at: Mapping[int, float]) -> None:
    """Write the training loss over steps."""
    steps = sorted(loss_at)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [loss_at[step] for step in steps])
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    figure.savefig(path, dpi=150)


def _whisker(estimate: Estimate) -> float:
    # matplotlib takes no None; a whisker of no length cannot be seen.
    return 0.0 if estimate.standard_error is None else 100 * estimate.standard_error
