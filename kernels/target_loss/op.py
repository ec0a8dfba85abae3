"""The LM head's loss on target rows: three GEMMs, two passes over each chunk of logits, no recomputation.

    loss_sum, losses_M = target_loss(hidden_TF, weight_VF, target_rows_M, target_ids_M)
    loss_sum.backward()

Gradients are made in the forward, while a chunk of logits is there: logits -> softmax - onehot in place ->
rows of d_hidden, and added to the weight's gradient. So the logits of more than one chunk never exist, and
nothing of the size of the vocabulary waits for the backward but the weight's own gradient.

The contract about scale. The forward must know what `loss_sum` will be multiplied by, since low-precision
logit gradients have to be scaled before they are rounded (fp16) and `weight_grad_VF` is added to at once:

    the gradient that reaches `loss_sum` in the backward is exactly `loss_scale`  (1 where none is given)

With `weight_grad_VF` the caller promises that: the buffer has received loss_scale * gradient when the forward
returns, whether a backward follows or not. Everything else is right for any upstream gradient: the backward
multiplies by upstream / loss_scale, on the device.

Under torch.compile a chunk is a few operators (`opaque.py`) that write to buffers they are given; the
reductions between them are traced.

Shapes: T slots, M targets, m targets of one chunk, F features, V rows of the vocabulary here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import require, require_kernel_device, require_kernel_dtype
from ..opaque import opaque
from ..weight_gradient import accumulate_weight_gradient
from .reference import Reduce

CHUNK = 2048
"""Targets whose logits exist at once: 206 MB in bf16 with OPT's vocabulary. Each chunk reads and writes the
whole fp32 gradient of the weight once more, so small chunks are slow."""


@dataclass(frozen=True)
class _Options:
    vocab_start: int
    group_max: Reduce | None
    group_sum: Reduce | None
    chunk: int
    grad_enabled: bool


def target_loss(
    hidden_TF: Tensor,
    weight_VF: Tensor,
    target_rows_M: Tensor,
    target_ids_M: Tensor,
    *,
    vocab_start: int = 0,
    group_max: Reduce | None = None,
    group_sum: Reduce | None = None,
    loss_scale: Tensor | None = None,
    weight_grad_VF: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of the targets, natural logarithm.

    Args:
        hidden_TF: [slots, features], contiguous; bf16, fp16 or fp32.
        weight_VF: this rank's rows of the vocabulary, same type.
        target_rows_M, target_ids_M: int64 [targets]; rows in [0, slots), in any order, repeats allowed; ids
            of the whole vocabulary. They are not checked: that would wait for the device.
        vocab_start: id of this rank's first row.
        group_max, group_sum: reduce an fp32 tensor of [targets] or [2, targets] over the vocabulary's ranks,
            in place; None on a single rank.
        loss_scale: fp32 scalar tensor, the gradient that `loss_sum` will get; None is 1.
        weight_grad_VF: fp32 buffer that receives the weight's gradient in the forward; the weight's own
            gradient is then None. Without it the weight gets its gradient in the backward.
        chunk: most targets whose logits exist at once.

    Returns:
        (loss_sum, losses): fp32 scalar with a gradient, and fp32 [targets] without one. The gradient of
        hidden covers this rank's vocabulary: the caller sums it over the ranks.

    Raises:
        ValueError: shapes, types or devices that do not go together; a chunk below 1; one reduction alone.
    """
    _check(hidden_TF, weight_VF, target_rows_M, target_ids_M, weight_grad_VF, chunk)
    if (group_max is None) != (group_sum is None):
        missing = "group_max" if group_max is None else "group_sum"
        raise ValueError(
            f"target_loss: one reduction is given, {missing} is None; allowed: both or neither; pass both of "
            "the vocabulary's group"
        )
    # Asked out here: inside a Function gradients are always off.
    options = _Options(vocab_start, group_max, group_sum, chunk, torch.is_grad_enabled())
    return _TargetLoss.apply(
        hidden_TF, weight_VF, target_rows_M, target_ids_M, loss_scale, weight_grad_VF, options
    )


def _check(
    hidden_TF: Tensor,
    weight_VF: Tensor,
    target_rows_M: Tensor,
    target_ids_M: Tensor,
    weight_grad_VF: Tensor | None,
    chunk: int,
) -> None:
    op, device = "target_loss", hidden_TF.device
    require_kernel_dtype(op, hidden_TF)
    if hidden_TF.dim() != 2 or weight_VF.dim() != 2:
        raise ValueError(
            f"{op}: hidden is {tuple(hidden_TF.shape)}, weight {tuple(weight_VF.shape)}; they must be "
            "[slots, features] and [vocabulary, features]: view them so"
        )
    require(op, "hidden", hidden_TF, tuple(hidden_TF.shape), hidden_TF.dtype, device)
    require(op, "weight", weight_VF, (weight_VF.shape[0], hidden_TF.shape[1]), hidden_TF.dtype, device)
    for name, index in (("target_rows", target_rows_M), ("target_ids", target_ids_M)):
        require(op, name, index, (target_rows_M.numel(),), torch.int64, device)
    if weight_grad_VF is not None:
        require(op, "weight_grad", weight_grad_VF, tuple(weight_VF.shape), torch.float32, device)
    if chunk < 1:
        raise ValueError(f"{op}: chunk is {chunk}; allowed: 1 or more. Leave it out for {CHUNK}")


def _chunks(num_targets: int, chunk: int) -> list[slice]:
    """Equal chunks, as few as may be: a small last one would cost as much traffic as a full one."""
    if num_targets == 0:
        return []
    # -(-a // b) rounds up.
    size = -(-num_targets // -(-num_targets // chunk))
    return [slice(first, min(first + size, num_targets)) for first in range(0, num_targets, size)]


def _target_statistics(
    logits_mV: Tensor, hidden_mF: Tensor, weight_VF: Tensor, ids_m: Tensor, scale: Tensor | None,
    vocab_start: int, wants_gradient: bool,
) -> Tensor:  # fmt: skip
    """Fill in the logits; their maximum, sum and target logit, [3, m]. They become their gradient if that is
    wanted."""
    # Asked here, not where the op is called: torch.compile cannot look into Triton.
    require_kernel_device("target_loss", hidden_mF)
    from .kernel import run_fused, run_statistics

    torch.mm(hidden_mF, weight_VF.t(), out=logits_mV)
    if wants_gradient:
        return run_fused(logits_mV, ids_m, scale, vocab_start)
    return run_statistics(logits_mV, ids_m, vocab_start)


def _target_gradient(
    logits_mV: Tensor, ids_m: Tensor, statistics: Tensor, scale: Tensor | None, vocab_start: int
) -> None:
    """Logits become their gradient, by statistics of the whole vocabulary."""
    from .kernel import run_gradient

    run_gradient(logits_mV, ids_m, statistics, scale, vocab_start)


def _target_hidden_gradient(d_hidden_mF: Tensor, logits_mV: Tensor, weight_VF: Tensor) -> None:
    torch.mm(logits_mV, weight_VF, out=d_hidden_mF)


def _target_scatter(source_MF: Tensor, target_rows_M: Tensor, factor: Tensor, num_slots: int) -> Tensor:
    from .kernel import run_scatter

    return run_scatter(source_MF, target_rows_M, factor, num_slots)


_fill_statistics = opaque(
    _target_statistics,
    lambda logits_mV, *unused: logits_mV.new_empty(3, logits_mV.shape[0], dtype=torch.float32),
    mutates=("logits_mV",),
)
_to_gradient = opaque(_target_gradient, lambda *unused: None, mutates=("logits_mV",))
_hidden_gradient = opaque(_target_hidden_gradient, lambda *unused: None, mutates=("d_hidden_mF",))
_scatter = opaque(
    _target_scatter,
    lambda source_MF, rows, factor, num_slots: source_MF.new_empty(num_slots, source_MF.shape[1]),
)


def _reduce(statistics: Tensor, options: _Options) -> None:
    """Make statistics of this rank's vocabulary those of the whole."""
    # The maximum first: sums over several ranks can only be added when all are relative to one.
    if options.group_max is not None:
        local_maximum = statistics[0].clone()
        options.group_max(statistics[0])
        statistics[1] *= torch.exp(local_maximum - statistics[0])
    if options.group_sum is not None:
        options.group_sum(statistics[1:])


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TF: Tensor,
        weight_VF: Tensor,
        target_rows_M: Tensor,
        target_ids_M: Tensor,
        loss_scale: Tensor | None,
        weight_grad_VF: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses, losses of the targets); makes the gradients too, chunk by chunk."""
        wants_hidden, wants_weight = (options.grad_enabled and need for need in ctx.needs_input_grad[:2])
        num_targets, (num_vocab, features) = target_rows_M.numel(), weight_VF.shape
        losses_M = torch.empty(num_targets, dtype=torch.float32, device=hidden_TF.device)
        d_hidden_MF = hidden_TF.new_empty(num_targets, features) if wants_hidden else None
        own_grad_VF = None
        # fp32 as well: chunks would else be added up in the weight's type.
        if wants_weight and weight_grad_VF is None:
            weight_grad_VF = own_grad_VF = torch.zeros_like(weight_VF, dtype=torch.float32)
        wants_gradient = wants_hidden or wants_weight
        is_whole = options.group_max is None and options.group_sum is None
        parts = _chunks(num_targets, options.chunk)
        # Rows of 16 bytes: the GEMMs are fast only on aligned rows, and V / ranks may be odd.
        stride = -(-num_vocab // 8) * 8
        # One buffer for all chunks; the first is the largest.
        buffer_CV = hidden_TF.new_empty(parts[0].stop if parts else 0, stride)[:, :num_vocab]
        for part in parts:
            hidden_mF = hidden_TF.index_select(0, target_rows_M[part])
            ids_m = target_ids_M[part]
            logits_mV = buffer_CV[: ids_m.numel()]
            # On one rank the row's gradient follows at once, while it is in the cache.
            statistics = _fill_statistics(
                logits_mV,
                hidden_mF,
                weight_VF,
                ids_m,
                loss_scale,
                options.vocab_start,
                is_whole and wants_gradient,
            )
            if not is_whole:
                _reduce(statistics, options)
                if wants_gradient:
                    _to_gradient(logits_mV, ids_m, statistics, loss_scale, options.vocab_start)
            # log of the sum of exp, less the target's logit.
            losses_M[part] = statistics[0] + torch.log(statistics[1]) - statistics[2]
            if d_hidden_MF is not None:
                _hidden_gradient(d_hidden_MF[part], logits_mV, weight_VF)
            if wants_weight and weight_grad_VF is not None:
                accumulate_weight_gradient(weight_grad_VF, logits_mV, hidden_mF)
        ctx.save_for_backward(target_rows_M, d_hidden_MF, own_grad_VF, loss_scale)
        ctx.num_slots, ctx.weight_dtype = len(hidden_TF), weight_VF.dtype
        ctx.mark_non_differentiable(losses_M)
        return losses_M.sum(), losses_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward has made and put the rows of targets back into the row of slots."""
        target_rows_M, d_hidden_MF, own_grad_VF, loss_scale = ctx.saved_tensors
        # 1 if the contract above is kept; a division on the device either way.
        factor = d_loss if loss_scale is None else d_loss / loss_scale
        d_hidden_TF = d_weight_VF = None
        if d_hidden_MF is not None:
            d_hidden_TF = _scatter(d_hidden_MF, target_rows_M, factor, ctx.num_slots)
        if own_grad_VF is not None:
            d_weight_VF = (own_grad_VF * factor).to(ctx.weight_dtype)
        return d_hidden_TF, d_weight_VF, *(None,) * 5
