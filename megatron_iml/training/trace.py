"""One row through the real schedule, forward and backward, and what it left in this rank's part of the model.

    trace = run_traced(engine, row)
    trace.losses_M                  # last stage: every target's loss
    trace.attention_T[5]            # digests of what layer 5's heads on this rank gave every slot, int64 [T]

Two traces of rows that differ in one document show how far the difference travels (`self_test.py`).

T slots of the row (attention sees all of them, whatever sequence parallelism cuts), M targets, F features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_iml.data.rows.assemble import Row
from megatron_iml.model.row import to_device

from .engine import Engine


@dataclass
class Trace:
    """What one run of the row left on this rank."""

    losses_M: Tensor | None = None
    """On the last stage."""
    gradients_TF: Tensor | None = None
    """Of the embedding's output, on the first stage."""
    rows_T: Tensor | None = None
    """Rows of the position table that were read, on the first stage."""
    attention_T: dict[int, Tensor] = field(default_factory=dict)
    """By global layer: digest of the attention output of this rank's heads, of every slot."""
    attention_gradients_T: dict[int, Tensor] = field(default_factory=dict)
    """By global layer: digest of the gradient that attention passes on, of every slot."""


def run_traced(engine: Engine, row: Row) -> Trace:
    """Run the row through the real schedule, once per pipeline stage so that interleaving has its
    micro-batches; what is kept is the first one's."""
    layout, trace = engine.layout, Trace()
    engine.zero_gradients()
    # An interleaved pipeline wants a multiple of its stages.
    batches = [[to_device(row, layout.device)] * layout.pipeline_size for _ in range(layout.virtual_size)]
    with _hooked(engine, trace):
        losses = engine.run([iter(chunk) for chunk in batches], layout.pipeline_size, forward_only=False)
    # These passes are no step's: the first report would count them.
    engine.timer.take()
    trace.losses_M = losses[0] if layout.is_last_stage else None
    return trace


@contextmanager
def _hooked(engine: Engine, trace: Trace) -> Iterator[None]:
    """Let the model's modules write into `trace`; left in place the hooks would keep gradients alive."""
    hooks = []
    for chunk in engine.chunks:
        if chunk.pre_process:
            hooks.append(chunk.embedding.register_forward_hook(_keep_gradient(trace)))
            table = chunk.embedding.position_embeddings
            hooks.append(table.register_forward_pre_hook(_keep_rows(trace)))
        for layer in chunk.decoder.layers:
            attention, index = layer.self_attention, layer.layer_number - 1
            # What goes into the output projection is what attention gave, before ranks are summed.
            hooks.append(attention.linear_proj.register_forward_pre_hook(_keep_output(trace, index)))
            hooks.append(attention.linear_qkv.register_forward_hook(_keep_qkv_gradient(trace, index)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep_gradient(trace: Trace) -> Callable[..., None]:
    def keep(gradient: Tensor) -> None:
        # A clone: the gradient's memory may be reused once the backward is through.
        if trace.gradients_TF is None:
            trace.gradients_TF = gradient[:, 0].clone()

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(keep)

    return hook


def _keep_rows(trace: Trace) -> Callable[..., None]:
    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trace.rows_T = inputs[0]

    return keep


def _keep_output(trace: Trace, layer: int) -> Callable[..., None]:
    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Recomputation runs a layer twice.
        trace.attention_T.setdefault(layer, _slot_digests(inputs[0]))

    return keep


def _keep_qkv_gradient(trace: Trace, layer: int) -> Callable[..., None]:
    def keep(gradient: Tensor) -> None:
        trace.attention_gradients_T.setdefault(layer, _slot_digests(gradient))

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, None]) -> None:
        # Under full recomputation the first run builds no graph.
        if output[0].requires_grad:
            output[0].register_hook(keep)

    return hook


def _slot_digests(hidden_T1F: Tensor) -> Tensor:
    """Sum of each slot's bit patterns, int64 [T]: exact in any order, and small enough to keep by layer."""
    # As integers, so that NaN equals itself and the order of the sum does not matter.
    bits = hidden_T1F.detach().contiguous()
    bits = bits.view({2: torch.int16, 4: torch.int32}[bits.element_size()])
    return bits.view(bits.shape[0], -1).sum(1, dtype=torch.int64)
