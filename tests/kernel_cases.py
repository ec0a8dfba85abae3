"""What the tests of all row-wise kernels share: where they run, in which types, on which numbers."""

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
