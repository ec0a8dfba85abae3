"""What ranks tell one another once a step: one all_gather of eight numbers a rank, read once.

    told = tell(engine, losses, rows)                # queued on the device, behind the backward
    reports = hear(told, rows, engine.config)        # the same tuple of RankReport on every rank, checked
    sum(report.loss_sum for report in reports)       # in the order of ranks: the same bits everywhere

Everything that needs all ranks in a step travels here: the loss, the target count, digests of the rows that
were read, a wish to stop, and how fast and full each rank is. In a training step the host waits for the
gradient's norm between the two calls, and what was told is there when the norm is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iml.config import Config, place_of_rank
from megatron_iml.model.row import send

from .agree import disagreement
from .engine import Engine
from .rows import StepRows


class RankReport(NamedTuple):
    """One rank's part of a step; all fp64, which holds every integer here exactly."""

    loss_sum: float = 0.0
    """Sum of its targets' losses; only one tensor rank of a last stage has any, so nothing counts twice."""
    num_targets: float = 0.0
    rows_digest: float = 0.0
    """Of the rows it ran: equal on all ranks of one replica."""
    documents_crc: float = 0.0
    """Of the plan's documents in this step: equal on all ranks."""
    num_misread: float = 0.0
    """Rows whose targets or visible pairs are not those that the plan states."""
    stop: float = 0.0
    """1 if a signal asked this rank to stop."""
    forward_seconds: float = 0.0
    """Its own forward passes, waiting for no other stage or replica (`timing.py`)."""
    peak_memory_bytes: float = 0.0
    """The most that tensors have taken in the run so far: nothing resets it. 0 on the CPU."""


def tell(engine: Engine, losses: list[Tensor], rows: StepRows, stop_requested: bool = False) -> Tensor:
    """Tell all ranks what this one did with its rows; waits for its forward, not for its backward.

    Returns:
        Every rank's report, fp64 [ranks, fields], on the device; to be read by `hear`.
    """
    # Every rank calls it as often as the others, with rows or without: it is a collective of the whole world.
    layout = engine.layout
    # fp64: a batch has up to 10^6 targets. Summed on the device: reading it here would wait for the backward.
    loss_sum = torch.zeros((), dtype=torch.float64, device=layout.device)
    # One tensor rank of a last stage speaks for its row.
    counted = losses if layout.is_last_stage and layout.tensor_rank == 0 else []
    for losses_M in counted:
        loss_sum += losses_M.double().sum()
    on_gpu = layout.device.type == "cuda"
    report = RankReport(
        num_targets=sum(losses_M.numel() for losses_M in counted),
        rows_digest=rows.digest(),
        documents_crc=rows.documents_crc,
        num_misread=rows.num_misread,
        stop=stop_requested,
        forward_seconds=engine.timer.take(),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
    )
    numbers = send(torch.tensor(report, dtype=torch.float64), layout.device)
    numbers[RankReport._fields.index("loss_sum")] = loss_sum
    gathered = numbers.new_empty(layout.world_size, len(report))
    # Not a reduction: who differs is to be named, and sums of floats are to be the same bits everywhere.
    dist.all_gather_into_tensor(gathered.view(-1), numbers)
    return gathered


def hear(told: Tensor, rows: StepRows, config: Config) -> tuple[RankReport, ...]:
    """Every rank's report, by rank; checked, so that all ranks raise if one has not run the plan's rows."""
    reports = tuple(RankReport(*row) for row in told.tolist())
    check_reports(reports, rows, config)
    return reports


def check_reports(reports: Sequence[RankReport], rows: StepRows, config: Config) -> None:
    """Raise RuntimeError, naming the ranks, unless all ranks ran the rows that the plan says.

    A middle stage that reads other bounds would mix documents silently; a replica that reads other rows would
    train on something else than the others believe.
    """
    remedy = "check that the plan's folder is the same on every node"
    # The widest first: ranks with another plan would also read other rows.
    plans = disagreement({rank: report.documents_crc for rank, report in enumerate(reports)})
    if plans:
        raise RuntimeError(f"{plans}: they take other documents from the plan; {remedy}")
    misread = [rank for rank, report in enumerate(reports) if report.num_misread]
    if misread:
        raise RuntimeError(f"ranks {misread} read rows whose targets or bounds are not the plan's; {remedy}")
    replicas: dict[int, dict[int, float]] = {}
    for rank, report in enumerate(reports):
        # Tensor ranks and stages of one replica run the same rows; replicas run different ones.
        replicas.setdefault(place_of_rank(config, len(reports), rank).data, {})[rank] = report.rows_digest
    for digests in replicas.values():
        odd = disagreement(digests)
        if odd:
            raise RuntimeError(f"{odd}: they read other rows of the plan; {remedy}")
    num_targets = int(sum(report.num_targets for report in reports))
    if num_targets != rows.num_targets:
        raise RuntimeError(
            f"the model saw {num_targets} targets in this step but the plan holds {rows.num_targets}: "
            "plan and corpus do not belong together; build the plan again for this corpus"
        )
