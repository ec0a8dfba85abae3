"""One optimizer step, top to bottom.

What enters: the step's rows and its learning rate. What leaves: a `StepResult`, equal on every rank. The loss
is the sum over all targets of the global batch divided once by their number, which the plan knew beforehand:
a mismatch stops the job.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .engine import Engine
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


def train_step(engine: Engine, rows: StepRows, learning_rate: float) -> StepResult:
    """Forward, backward, reduce, clip, update."""
    check_same_rows(engine, rows)
    engine.zero_gradients()
    losses = engine.run(rows.micro_batches(engine.layout), len(rows.rows), forward_only=False)
    loss_sum, num_targets = sum_over_ranks(engine, losses)
    # Before the update: weights that saw wrong targets are not worth saving.
    check_targets(num_targets, rows)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    updated, grad_norm, _ = engine.optimizer.step()
    loss = loss_sum / max(num_targets, 1)
    # fp16 skips a step that overflows and goes on with a lower scale; an update made of NaN is the end.
    if updated and not math.isfinite(loss + float(grad_norm)):
        raise FloatingPointError(
            f"loss {loss} with gradient norm {grad_norm}: the run has diverged; go on from an earlier "
            "checkpoint with a lower optimizer.learning_rate"
        )
    return StepResult(
        loss=loss,
        num_targets=num_targets,
        grad_norm=float(grad_norm) if grad_norm is not None else float("nan"),
        loss_scale=float(engine.optimizer.get_loss_scale()),
        skipped=not updated,
    )


def sum_over_ranks(engine: Engine, losses: list[Tensor]) -> tuple[float, int]:
    """Add up loss sum and target count over the whole global batch.

    Only one tensor rank of each last stage contributes, so that nothing counts twice.
    """
    layout = engine.layout
    # fp64: a batch has up to 10^6 targets, and the count must come out exact.
    totals = torch.zeros(2, dtype=torch.float64, device=layout.device)
    if layout.is_last_stage and layout.tensor_rank == 0:
        for losses_M in losses:
            totals[0] += losses_M.double().sum()
            totals[1] += losses_M.numel()
    dist.all_reduce(totals)
    loss_sum, num_targets = totals.tolist()
    return loss_sum, int(num_targets)


def check_same_rows(engine: Engine, rows: StepRows) -> None:
    """All ranks that share a row must read the same layout of it; a middle stage that does not would leak
    silently."""
    # All tensor and pipeline ranks of one replica; other replicas run other rows.
    group = engine.layout.groups.mp
    digest = torch.tensor([rows.digest()], dtype=torch.int64, device=engine.layout.device)
    digests = [torch.empty_like(digest) for _ in range(group.size())]
    dist.all_gather(digests, digest, group=group)
    values = torch.cat(digests).tolist()
    if len(set(values)) > 1:
        common = max(set(values), key=values.count)
        ranks = dist.get_process_group_ranks(group)
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
        raise RuntimeError(
            f"ranks {odd} read other rows of the plan than the rest of ranks {ranks}: check that "
            "the plan's folder is the same on every node"
        )


def check_targets(num_targets: int, rows: StepRows) -> None:
    """The plan's count and the model's count are one number."""
    if num_targets != rows.num_targets:
        raise RuntimeError(
            f"the model saw {num_targets} targets in this step but the plan holds {rows.num_targets}: "
            "plan and corpus do not belong together, or a rank ran other rows; build the plan again for "
            "this corpus"
        )
