"""`document_attention`, the operation: checks, registration and autograd around the Triton kernels.

    out_THD = document_attention(qkv_T1C.view(-1, heads, 3, head_dim), DocumentBounds.from_end(end_T),
                                 softmax_scale=head_dim**-0.5)

What enters: the fused projection as it is, any strides with D contiguous; it is never split, transposed or
copied. What leaves: a contiguous [T, H, D]; the backward hands back one contiguous gradient [T, H, 3, D].
Nothing synchronises with the host and nothing is decided by values, so the op runs under torch.compile and
in a CUDA graph; replays with a new `dropout_key` tensor draw new masks.

T slots of the row, H heads here, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import require, require_kernel_device
from ..opaque import opaque
from ..philox import key_tensor
from .bounds import DocumentBounds, TileSchedule, whole_tiles

LARGEST_HEAD_DIM = 128


def _document_attention_forward(
    qkv: Tensor, end: Tensor, schedule: Sequence[Tensor], dropout_key: Tensor, softmax_scale: float,
    dropout_probability: float, first_head: int, key_tile: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Asked here, not where the op is called: torch.compile cannot look into Triton, nor see addresses.
    require_kernel_device("document_attention", qkv)
    _require_alignment(qkv)
    from .launch import Problem, launch_forward

    numbers = (softmax_scale, dropout_probability, first_head)
    return launch_forward(Problem(qkv, end, TileSchedule(key_tile, *schedule), dropout_key, *numbers))


def _document_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse2: Tensor, end: Tensor, schedule: Sequence[Tensor],
    dropout_key: Tensor, softmax_scale: float, dropout_probability: float, first_head: int, key_tile: int,
) -> Tensor:  # fmt: skip
    from .launch import Problem, launch_backward

    # qkv has been checked in the forward; the gradient is whatever autograd brings.
    numbers = (softmax_scale, dropout_probability, first_head)
    problem = Problem(qkv, end, TileSchedule(key_tile, *schedule), dropout_key, *numbers)
    grad = grad.contiguous()
    # The copy engine counts in 16 bytes; a slice of a larger gradient may begin between them.
    return launch_backward(problem, out, lse2, grad.clone() if grad.data_ptr() % 16 else grad)


def _fake_forward(qkv: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _, head_dim = qkv.shape
    lse2_HT = qkv.new_empty(heads, whole_tiles(tokens), dtype=torch.float32)
    return qkv.new_empty(tokens, heads, head_dim), lse2_HT


def _fake_backward(grad: Tensor, qkv: Tensor, *unused: Any) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


_forward = opaque(_document_attention_forward, _fake_forward)
_backward = opaque(_document_attention_backward, _fake_backward)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, numbers: tuple[float, float, int, int], end: Tensor, dropout_key: Tensor,
        *schedule: Tensor,
    ) -> Tensor:  # fmt: skip
        """Keeps what the backward recomputes probabilities from; those themselves are nowhere."""
        out, lse2 = _forward(qkv, end, schedule, dropout_key, *numbers)
        # No tensor on ctx itself: it would escape saved-tensor hooks.
        ctx.numbers = numbers
        ctx.save_for_backward(qkv, out, lse2, end, dropout_key, *schedule)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the fused projection, in one piece."""
        qkv, out, lse2, end, dropout_key, *schedule = ctx.saved_tensors
        d_qkv = _backward(grad, qkv, out, lse2, end, schedule, dropout_key, *ctx.numbers)
        return (d_qkv, None, None, None, *[None] * len(schedule))


def document_attention(
    qkv_TH3D: Tensor,
    bounds: DocumentBounds,
    softmax_scale: float,
    dropout_probability: float = 0.0,
    dropout_key: int | Tensor = 0,
    first_head: int = 0,
) -> Tensor:
    """Attention of every token to the tokens of its own document at or before it, in Triton.

    Args:
        qkv_TH3D: [tokens, heads, 3, head size], query, key and value of each head side by side; bf16, fp16 or
            fp32 on a GPU (any device under TRITON_INTERPRET=1), head size up to 128, contiguous in D; its
            address, its other strides and the head size are multiples of 16 bytes.
        bounds: who sees whom, on the same device.
        softmax_scale: positive factor on the scores, usually head size ** -0.5.
        dropout_probability: share of attention probabilities dropped, in [0, 1); the rest is scaled by
            1 / (1 - p). The masks are those of `philox.keep_mask` at (row, column, first_head + head).
        dropout_key: Philox key of this row, layer and place, an int or an int64 tensor of no dimensions.
        first_head: global index of the first head here, so that masks do not depend on tensor parallelism.

    Returns:
        [tokens, heads, head size] in the type of qkv; sums run in fp32. Rows that see nothing are zero. A NaN
        or an infinity reaches only rows that see it.

    Raises:
        ValueError: an argument outside of what is said above.
    """
    _require(qkv_TH3D, bounds, softmax_scale, dropout_probability)
    if isinstance(dropout_key, int):
        dropout_key = key_tensor(dropout_key, qkv_TH3D.device)
    # A kernel reads what the pointer's type says: 32 bits would pass for all of a key.
    require("document_attention", "dropout_key", dropout_key, (), torch.int64, qkv_TH3D.device)
    # The schedule's tensors one by one: autograd sees only tensors that are arguments themselves.
    numbers = (softmax_scale, dropout_probability, first_head, bounds.schedule.columns)
    return _DocumentAttention.apply(qkv_TH3D, numbers, bounds.end_T, dropout_key, *bounds.schedule.tensors())


def _require(qkv: Tensor, bounds: DocumentBounds, scale: float, probability: float) -> None:
    shape, end = tuple(qkv.shape), bounds.end_T
    if qkv.dim() != 4 or shape[2] != 3 or not 1 <= shape[3] <= LARGEST_HEAD_DIM or qkv.stride(3) != 1:
        raise ValueError(
            f"document_attention: qkv has shape {shape} and strides {qkv.stride()}; allowed: [tokens, heads, "
            f"3, head size 1 to {LARGEST_HEAD_DIM}] with stride 1 in the last dimension; view the fused "
            "projection as such"
        )
    if (tuple(end.shape), end.dtype, end.device) != ((shape[0],), torch.int32, qkv.device):
        raise ValueError(
            f"document_attention: end is {end.dtype} {tuple(end.shape)} on {end.device}; it must be "
            f"torch.int32 {(shape[0],)} on {qkv.device}, like qkv; build the bounds from the row's own end"
        )
    if not scale > 0.0:
        raise ValueError(
            f"document_attention: softmax_scale is {scale}; it must be above 0, try {shape[3]}**-0.5"
        )
    if not 0.0 <= probability < 1.0:
        raise ValueError(
            f"document_attention: dropout_probability is {probability}; allowed: 0 <= p < 1; leave it out "
            "for 0"
        )


def _require_alignment(qkv: Tensor) -> None:
    """The copy engine counts in 16 bytes."""
    # The head size too: it is how far apart heads lie in the gradient of the output, which is contiguous.
    steps = (qkv.data_ptr(), *(step * qkv.element_size() for step in (*qkv.stride()[:3], qkv.shape[3])))
    if any(step % 16 for step in steps):
        raise ValueError(
            f"document_attention: qkv has strides {qkv.stride()}, head size {qkv.shape[3]}, address "
            f"{qkv.data_ptr()}, elements of {qkv.element_size()} bytes; allowed: address, head size and all "
            "strides but the last in multiples of 16 bytes; pass a contiguous projection, with a padded head "
            "size if need be"
        )
