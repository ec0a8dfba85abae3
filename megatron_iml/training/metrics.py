"""One row of metrics.jsonl a step: what was trained on, how fast, and which rank held the others up.

What enters: the step's rows and its result. What leaves: a dictionary for the reporter, of which the console
line shows a part:

    {"step": 12, "loss": 3.21, "fill": 0.997, ..., "slowest_rank": 3, "slowest_over_peers": 1.02}
"""

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_iml.config import Config, place_of_rank

from .prepare import Run
from .reports import RankReport
from .rows import StepRows
from .step import StepResult


def step_row(
    step: int, rate: float, rows: StepRows, result: StepResult, seconds: float, run: Run
) -> dict[str, Any]:
    """One row of metrics.jsonl. Rates count real tokens, never padding, over all ranks."""
    positions = rows.num_rows * run.config.data.row_length
    row = {
        "step": step,
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "seconds": seconds,
        "real_tokens": rows.num_real,
        "targets": result.num_targets,
        "documents": rows.num_documents,
        # For whoever compares two runs: they have read the same data as long as these agree.
        "documents_crc": rows.documents_crc,
        "fill": rows.num_real / positions,
        "real_tokens_per_second": rows.num_real / seconds,
        "target_tokens_per_second": result.num_targets / seconds,
        "useful_tflops_per_gpu": rows.useful_flops / seconds / 1e12 / run.engine.layout.world_size,
        "loss_scale": result.loss_scale,
        "skipped": result.skipped,
    }
    # Two lists as long as the world: not in every row.
    is_logged = step % run.config.training.log_interval == 0
    return row | rank_metrics(result.reports, run.config, is_logged)


def rank_metrics(reports: Sequence[RankReport], config: Config, is_logged: bool) -> dict[str, Any]:
    """Who is slow and who is full; every rank's numbers, by rank, in steps that are logged.

    `slowest_over_peers` compares the slowest rank with the median of its own stage: stages differ by design,
    the ranks of one stage have equal work.
    """
    seconds = [report.forward_seconds for report in reports]
    gib = [report.peak_memory_bytes / 2**30 for report in reports]
    slowest = seconds.index(max(seconds))
    stages = [place_of_rank(config, len(reports), rank).stage for rank in range(len(reports))]
    peers = [time for time, stage in zip(seconds, stages, strict=True) if stage == stages[slowest]]
    metrics: dict[str, Any] = {
        "slowest_rank": slowest,
        "slowest_forward_seconds": seconds[slowest],
        "slowest_over_peers": seconds[slowest] / statistics.median(peers),
    }
    if is_logged:
        metrics["forward_seconds_by_rank"] = seconds
    # The CPU counts no memory.
    if any(gib):
        metrics |= {"peak_memory_rank": gib.index(max(gib)), "peak_memory_gib": max(gib)}
        metrics |= {"peak_memory_gib_by_rank": gib} if is_logged else {}
    return metrics
