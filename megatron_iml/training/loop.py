"""The loop: take the step's rows, step, report, validate and save when due. Nothing else lives here.

What enters: a prepared `Run` (see prepare.py). What leaves: checkpoints and a trace in the output directory.
"""

import time
from contextlib import closing
from dataclasses import replace

from megatron_iml.config import rows_per_step

from .metrics import step_row
from .prepare import Run
from .reporter import Reporter
from .rows import step_rows
from .schedule import learning_rate
from .signals import StopRequest
from .step import train_step
from .validation import validation_losses


def train(run: Run) -> bool:
    """Run all steps that are left. Returns False if a signal ended it early, after a checkpoint."""
    config = run.config
    reporter = Reporter(
        run.directory,
        config.training.steps,
        run.state.step,
        config.training.log_interval,
        enabled=run.engine.layout.reports,
    )
    # Closed on errors too: the terminal gets its cursor back, TensorBoard its last events.
    with closing(reporter):
        for line in run.introduction():
            reporter.say(line)
        last_step = _train_steps(run, reporter)
        # Another process may still be writing the last save, which nobody would complete.
        for line in run.store.wait():
            reporter.say(line)
    return last_step == config.training.steps


def _train_steps(run: Run, reporter: Reporter) -> int:
    """Step until the last step or a signal; returns the steps taken, the last of them saved."""
    config, engine, layout = run.config, run.engine, run.engine.layout
    steps, num_rows = config.training.steps, rows_per_step(config)
    # From here on a signal is a wish; before, it ends the process, which has nothing to save yet.
    stop = StopRequest()
    state, stopped = run.state, False
    while state.step < steps and not stopped:
        began = time.perf_counter()
        rate = learning_rate(state.step, steps, config.optimizer)
        # Rows are counted, not derived from the step: a resumed run may take batches of another size.
        due_rows = range(state.rows_consumed, state.rows_consumed + num_rows)
        # Read only when due: they come from mapped files, in well under a millisecond each.
        rows = step_rows(run.train_loader, due_rows, config, layout)
        # A background save may still be reading the weights: `before_update` waits until it is through.
        result = train_step(engine, rows, rate, stop.received, run.store.before_update)
        # Skipped fp16 steps count too: their rows are consumed and the schedule goes on.
        state = replace(state, step=state.step + 1, rows_consumed=state.rows_consumed + num_rows)
        # The device may still be at the update, which the next step's time then holds.
        seconds = time.perf_counter() - began
        reporter.step(step_row(state.step, rate, rows, result, seconds, run))
        # What all ranks know, not what this one received: a rank that left alone would leave others waiting.
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
