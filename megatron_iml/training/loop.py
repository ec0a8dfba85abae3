"""The loop: take the step's rows, step, report, validate and save when due. Nothing else lives here.

What enters: a prepared `Run` (see prepare.py). What leaves: checkpoints and a trace in the output directory.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from megatron_iml.config import Config, place_of_rank, rows_per_step

from .prepare import Run
from .reporter import Reporter
from .reports import RankReport
from .rows import StepRows, step_rows
from .schedule import learning_rate
from .signals import StopRequest
from .step import StepResult, train_step
from .validation import validation_losses


def train(run: Run) -> bool:
    """Run all steps that are left. Returns False if a signal ended it early, after a checkpoint."""
    config = run.config
    reporter = Reporter(
        run.directory,
        config.training.steps,
        run.state.step,
        config.training.log_interval,
        run.engine.layout.reports,
    )
    # Closed on errors too: the terminal gets its cursor back, TensorBoard its last events.
    with closing(reporter):
        for line in run.introduction():
            reporter.say(line)
        last_step = _train_steps(run, reporter)
        for line in run.store.wait():
            reporter.say(line)
    return last_step == config.training.steps


def _train_steps(run: Run, reporter: Reporter) -> int:
    """Step until the last step or a signal; returns the steps taken, the last of them saved."""
    config, engine, layout = run.config, run.engine, run.engine.layout
    steps, num_rows = config.training.steps, rows_per_step(config)
    stop = StopRequest()
    state, stopped = run.state, False
    while state.step < steps and not stopped:
        began = time.perf_counter()
        rate = learning_rate(state.step, steps, config.optimizer)
        due_rows = range(state.rows_consumed, state.rows_consumed + num_rows)
        rows = step_rows(run.train_loader, due_rows, config, layout)
        result = train_step(engine, rows, rate, stop.received, run.store.before_update)
        # Skipped fp16 steps count too: their rows are consumed and the schedule goes on.
        state = replace(state, step=state.step + 1, rows_consumed=state.rows_consumed + num_rows)
        seconds = time.perf_counter() - began
        reporter.step(step_row(state.step, rate, rows, result, seconds, run))
        # After the step, so that the checkpoint holds it.
        stopped = result.stop
        is_last = state.step == steps
        # A signal leaves minutes: they are for the checkpoint, unless this is the last chance to validate.
        wants_validation = is_last or (_due(state.step, config.training.validation_interval) and not stopped)
        losses: dict[str, float] = {}
        # Before the save: a checkpoint that is there never lacks its validation in the trace.
        if run.validation_loaders and wants_validation:
            losses = validation_losses(engine, run.validation_loaders)
            reporter.validation(state.step, losses)
        said = []
        # Once, whichever reasons meet: a second save of a step would be refused.
        if is_last or stopped or _due(state.step, config.checkpoint.save_interval):
            said += run.store.save(engine, state, losses)
        # A finished save is marked complete here, at most one step late.
        for line in [*said, *run.store.poll()]:
            reporter.say(line)
    return state.step


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


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
        "documents_crc": rows.documents_crc,
        "fill": rows.num_real / positions,
        "real_tokens_per_second": rows.num_real / seconds,
        "target_tokens_per_second": result.num_targets / seconds,
        "useful_tflops_per_gpu": rows.useful_flops / seconds / 1e12 / run.engine.layout.world_size,
        "loss_scale": result.loss_scale,
        "skipped": result.skipped,
    }
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
