"""One optimizer step, top to bottom.

What enters: the step's rows and its learning rate. What leaves: a `StepResult`, equal on every rank. The loss
is the sum over all targets of the global batch divided once by their number, which the plan knew beforehand:
a mismatch stops the job.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .engine import Engine
from .optimizer import scale_gradients
from .reports import RankReport, hear, tell
from .rows import StepRows


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same numbers on every rank."""

    loss: float
    """Mean negative log-likelihood per target, natural log."""
    num_targets: int
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    loss_scale: float
    skipped: bool
    """fp16 only: the gradient overflowed and no weight changed."""
    stop: bool = False
    """Whether any rank was asked to stop: known to all at once, so that no rank saves alone."""
    reports: tuple[RankReport, ...] = field(default=(), compare=False, repr=False)
    """By rank; left out of comparisons, since clocks differ."""


def train_step(
    engine: Engine,
    rows: StepRows,
    learning_rate: float,
    stop_requested: bool = False,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, update.

    `before_update` is called when weights and optimizer state are about to change: not before all else is
    done, so that whoever still reads them has the length of a forward and backward for it.
    """
    engine.zero_gradients()
    # Leaves each data rank its slice of the gradients, summed over micro-batches and replicas.
    losses = engine.run(rows.micro_batches(engine.layout), len(rows.rows), forward_only=False)
    # Queued before the host waits for the norm, so that it is there when the norm is.
    told = tell(engine, losses, rows, stop_requested)
    optimizer = engine.optimizer
    # Gives master weights their slices; fp16's are divided by the loss scale, which adapts to what is found.
    overflowed = optimizer.prepare_grads()
    # Over the whole world, with every weight once; the host waits for the device here. Gradients are sums
    # until the update divides them: the plan knows by what, and `hear` compares it with what was seen.
    grad_norm = math.nan if overflowed else float(optimizer.get_grad_norm()) / max(rows.num_targets, 1)
    # Before the update: weights that saw wrong rows are not worth saving, nor those made of NaN.
    reports = hear(told, rows, engine.config)
    loss = mean_loss(reports)
    # fp16 skips a step that overflows and goes on with a lower scale. Every rank holds these numbers, so that
    # all raise or none does.
    if not overflowed:
        require_finite(loss, grad_norm, engine.config.training.output_directory)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if not overflowed:
        if before_update is not None:
            before_update()
        # Leaves a factor with Adam, whose kernel scales gradients as it reads them.
        scale_gradients(optimizer, rows.num_targets, grad_norm, engine.config.optimizer.clip_grad)
        # Adam on the slices of fp32 weights, which replicas then gather; overlapped, during the next forward.
        optimizer.step_with_ready_grads()
    # Elsewhere it is 1, but on the device: reading it would wait for the whole update.
    scaled = engine.config.training.precision == "fp16"
    return StepResult(
        loss=loss,
        num_targets=rows.num_targets,
        grad_norm=grad_norm,
        loss_scale=float(optimizer.get_loss_scale()) if scaled else 1.0,
        skipped=overflowed,
        stop=any(report.stop for report in reports),
        reports=reports,
    )


def require_finite(loss: float, grad_norm: float, output_directory: str) -> None:
    """End a run that has diverged before its weights do.

    Raises:
        FloatingPointError: the loss or the gradient's norm is NaN or infinite.
    """
    if not math.isfinite(loss + grad_norm):
        raise FloatingPointError(
            f"loss {loss} with gradient norm {grad_norm}: the run has diverged. The same command would go on "
            f"from the newest checkpoint: remove those in {output_directory}/checkpoints from after the "
            "losses went wrong, and lower optimizer.learning_rate"
        )


def mean_loss(reports: tuple[RankReport, ...]) -> float:
    """Loss per target over the whole global batch; 0 where there is no target at all."""
    # Added in the order of ranks, by each for itself: the same bits on all of them.
    num_targets = sum(report.num_targets for report in reports)
    return sum(report.loss_sum for report in reports) / max(num_targets, 1)
