"""The loop: take the step's rows, step, report, validate and save when due. Nothing else lives here.

What enters: a prepared `Run` (see prepare.py). What leaves: checkpoints and a trace in the output directory.
"""

import time
from typing import Any

import torch

from megatron_iml.checkpoint.store import RunState
from megatron_iml.config import rows_per_step

from .prepare import Run
from .reporter import Reporter
from .rows import StepRows, step_rows
from .schedule import learning_rate
from .signals import StopRequest
from .step import StepResult, train_step
from .validation import validation_losses


def train(run: Run) -> bool:
    """Run all steps that are left. Returns False if a signal ended it early, after a checkpoint."""
    config, engine, layout = run.config, run.engine, run.engine.layout
    steps, num_rows = config.training.steps, rows_per_step(config)
    reporter = Reporter(run.directory, steps, run.state.step, config.training.log_interval, layout.reports)
    stop = StopRequest()
    state, stopped = run.state, False
    for line in run.introduction():
        reporter.say(line)
    while state.step < steps and not stopped:
        began = time.perf_counter()
        rate = learning_rate(state.step, steps, config.optimizer)
        rows = step_rows(
            run.train_loader, range(state.rows_consumed, state.rows_consumed + num_rows), config, layout
        )
        result = train_step(engine, rows, rate)
        state = RunState(state.step + 1, state.rows_consumed + num_rows, state.plan_fingerprint)
        seconds = time.perf_counter() - began
        reporter.step(step_row(state.step, rate, rows, result, seconds, run))
        stopped = stop.agreed(layout.device)
        is_last = state.step == steps
        if run.validation_loaders and (is_last or _due(state.step, config.training.validation_interval)):
            reporter.validation(state.step, validation_losses(engine, run.validation_loaders))
        if is_last or stopped or _due(state.step, config.checkpoint.save_interval):
            reporter.say(f"  saving {run.store.save(engine, state)}")
        run.store.poll()
    run.store.wait()
    reporter.close()
    return not stopped


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
    if torch.cuda.is_available():
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row
