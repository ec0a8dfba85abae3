"""What a run says: one console line a step with a progress bar, metrics.jsonl, TensorBoard.

Only the rank that `Layout.reports` creates one that writes; on all others every call does nothing. A row of
metrics.jsonl:

    {"step": 12, "loss": 3.21, "learning_rate": 5e-4, "real_tokens_per_second": 12000.0, ...}

`step` counts updates taken, so the first row is step 1. On resume rows after the checkpoint are dropped: the
joined trace has every step once.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter


class Reporter:
    """Writes a run's trace."""

    def __init__(
        self, directory: Path, steps: int, first_step: int, log_interval: int, enabled: bool
    ) -> None:
        """Open the trace.

        Args:
            directory: the run's output directory.
            steps: steps of the whole run.
            first_step: steps already taken; later rows of an earlier try are dropped.
            log_interval: steps between console lines.
            enabled: false on every rank but one.
        """
        self.enabled, self.steps, self.log_interval = enabled, steps, log_interval
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        # Replaced whole: a run that is killed right here keeps its trace.
        trimmed = path.with_suffix(".tmp")
        trimmed.write_text("".join(_rows_up_to(path, first_step)))
        trimmed.replace(path)
        self.file = path.open("a")
        # An earlier try's events from this step on stay in its file; TensorBoard hides them.
        self.tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        # A log file gets plain lines at any width; only a terminal gets the bar.
        self.console = Console(width=None if sys.stdout.isatty() else 250)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=first_step)
        self.progress.start()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.enabled:
            # Lists of ranks stand in square brackets, which rich would take for markup.
            self.console.print(text, highlight=False, markup=False)

    def step(self, row: dict[str, Any]) -> None:
        """Record one step."""
        if not self.enabled:
            return
        self._write(row)
        self.progress.update(self.task, completed=row["step"])
        if row["step"] % self.log_interval == 0 or row["step"] == self.steps:
            self.say(step_line(row, self.steps))

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Record the validation loss of every level."""
        if not self.enabled:
            return
        self._write({"step": step, "validation": losses})
        self.say("  validation | " + " | ".join(f"{level} {loss:.4f}" for level, loss in losses.items()))

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(_without_nan(row)) + "\n")
        # A killed run keeps every step it has taken.
        self.file.flush()
        for name, value in (row.get("validation") or row).items():
            # Counts and flags stay in metrics.jsonl: they make no curve.
            if isinstance(value, float):
                tag = f"validation_loss/{name}" if "validation" in row else f"train/{name}"
                self.tensorboard.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            self.progress.stop()
            self.file.close()
            self.tensorboard.close()


def step_line(row: dict[str, Any], steps: int) -> str:
    """The console line of one step."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"grad norm {row['grad_norm']:.3f}",
        f"{row['real_tokens_per_second']:,.0f} real tok/s",
        f"{row['target_tokens_per_second']:,.0f} target tok/s",
        f"fill {row['fill']:.1%}",
        f"{row['useful_tflops_per_gpu']:.3g} useful TFLOP/s per rank",
        f"{1000 * row['seconds']:,.0f} ms",
    ]
    # By its own forward passes: a step lasts equally long on every rank.
    if row["slowest_over_peers"] > 1.2:
        parts.append(f"rank {row['slowest_rank']} is {row['slowest_over_peers'] - 1:.0%} slower")
    if row["loss_scale"] != 1.0:
        parts.append(f"loss scale {row['loss_scale']:g}")
    if row["skipped"]:
        parts.append("SKIPPED: gradient overflow")
    return " | ".join(parts)


def _without_nan(value: Any) -> Any:
    """None for what JSON has no word for, such as the norm of a gradient that overflowed."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows_up_to(path: Path, step: int) -> list[str]:
    """Lines of an earlier try up to the step it resumes from; a half written last line is dropped."""
    kept: list[str] = []
    # A run that starts at 0 owns the folder: what lies there never reached a checkpoint.
    if step and path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            # Steps only rise, and a line without its end is the last: nothing after either is wanted.
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
    return kept
