"""What the tests of all row-wise kernels share: where they run, in which types, on which numbers."""

import functools

import pytest
import torch
from torch import Tensor

from megatron_iml.kernels.testing import Op, run_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Triton's interpreter has bf16 products wrong, so bf16 is for GPUs."""


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Random numbers on DEVICE that need a gradient; the same on every device, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
    return values.to(DEVICE, dtype).requires_grad_()


def on_device(value: object) -> object:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def assert_repeats_equal(op: Op, inputs: dict[str, Tensor], upstream: list[Tensor], repeats: int) -> None:
    """The same bits every time: no atomics, no race."""
    first = run_op(op, inputs, upstream)
    for _ in range(repeats):
        again = run_op(op, inputs, upstream)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} differs between two runs"


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, None]:
    """flash_attn_varlen_func in plain torch, as strict about its arguments as the real one."""
    assert causal and deterministic and q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    edges = cu_seqlens_q.tolist()
    assert edges[0] == 0 and edges[-1] == len(q), f"edges {edges} of {len(q)} slots"
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(edges, edges[1:], strict=False))
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=softmax_scale
    )
    parts = [
        attend(*(tensor[first:stop].transpose(0, 1) for tensor in (q, k, v))).transpose(0, 1)
        for first, stop in zip(edges, edges[1:], strict=False)
    ]
    # Versions 3 and 4 return a pair.
    return torch.cat(parts), None
