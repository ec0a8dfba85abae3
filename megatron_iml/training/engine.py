"""A model that can be stepped: chunks, gradient buffers, optimizer and the pipeline schedule around them.

    engine = build_engine(config, layout)             # weights allocated, still to be filled
    losses = engine.run(iterators, num_micro_batches, forward_only=False)

The schedule is megatron-core's. Each micro-batch is one packed row, so shapes are fixed: [row_length, 1,
hidden].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_iml.config import Config
from megatron_iml.model.build import build_model
from megatron_iml.model.head import TargetLosses
from megatron_iml.model.opt import OPTModel
from megatron_iml.model.row import MicroBatch
from megatron_iml.parallel.groups import Layout

from .optimizer import build_optimizer, wrap_model
from .timing import ForwardTimer


@dataclass(frozen=True)
class Engine:
    """This rank's part of the model and what trains it."""

    config: Config
    layout: Layout
    chunks: list[OPTModel]
    wrapped: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    timer: ForwardTimer

    def run(
        self, batches: Sequence[Iterator[MicroBatch]], num_micro_batches: int, forward_only: bool
    ) -> list[Tensor]:
        """Run micro-batches through the pipeline.

        Args:
            batches: one iterator per chunk, over the same rows.
            num_micro_batches: rows this rank runs.
            forward_only: no gradients, and no dropout.

        Returns:
            On the last stage the per-target losses of every micro-batch, fp32 [M] each, detached; elsewhere
            nothing.
        """
        for chunk in self.wrapped:
            chunk.train(not forward_only)
        # Asked each time: it depends on groups that tests rebuild in one process.
        schedule = get_forward_backward_func()
        # The schedules leave gradients on when there is no backward: each row would keep its activations, and
        # the head, which makes its weight's gradient in the forward, would add it to the buffer.
        with torch.set_grad_enabled(not forward_only):
            return schedule(
                forward_step_func=partial(_forward_step, self.timer),
                data_iterator=list(batches),
                model=list(self.wrapped),
                num_microbatches=num_micro_batches,
                # The shape of messages between stages; sequence parallelism divides the first by itself.
                seq_length=self.config.data.row_length,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def gather_weights(self) -> None:
        """Finish a parameter gather that would otherwise overlap the next forward; weights are whole after
        this."""
        # Without overlap the optimizer has gathered them in its own step.
        if self.config.parallel.overlap_param_gather:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)

    def zero_gradients(self) -> None:
        """Clear the gradient buffers before a step."""
        # The optimizer alone would leave the fp32 buffers that gradients are summed in.
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


def _forward_step(
    timer: ForwardTimer, batches: Iterator[MicroBatch], chunk: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """megatron-core's hook: run one micro-batch through one chunk.

    Returns the chunk's output and, for the last stage, a function that makes of it the loss sum, the number
    of targets and what to report. Three values and `calculate_per_token_loss`: megatron-core then leaves the
    sum a sum, instead of averaging averages; the update divides it (`scale_gradients`).
    """
    # On every stage: middle ones need the bounds and dropout keys of the row.
    batch = next(batches)
    with timer.measure():
        output = chunk(batch)
    losses = output if isinstance(output, TargetLosses) else None

    def report(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Called by the schedule on the last stage alone, before the backward."""
        assert losses is not None, "only the last stage has losses to report"
        # Filled on the device: a copy from the host would wait for everything that is queued there.
        count = torch.full((), losses.losses_M.numel(), dtype=torch.int, device=total.device)
        return total, count, losses.losses_M

    return (output if losses is None else losses.total), report


def build_engine(config: Config, layout: Layout) -> Engine:
    """Allocate model, gradient buffers and optimizer. The caller fills the weights and then calls
    `optimizer.reload_model_params`, which copies them to the fp32 master weights."""
    chunks = build_model(config, layout)
    # Moves the parameters into buffers of its own: whoever fills them copies in place.
    wrapped = wrap_model(chunks, config)
    timer = ForwardTimer(layout.device)
    return Engine(config, layout, chunks, wrapped, build_optimizer(wrapped, config), timer)
