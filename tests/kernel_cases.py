"""What the tests of all row-wise kernels share: where they run, in which types, and the comparison itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_iml.kernels.testing import GRADIENT_FACTOR, assert_within_budget, nan_poison

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Triton's interpreter has bf16 products wrong, so bf16 is for GPUs."""

Op = Callable[..., tuple[Tensor, ...]]


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Random numbers on DEVICE that need a gradient; the same on every device, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
    return values.to(DEVICE, dtype).requires_grad_()


def on_device(value: object) -> object:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def run(op: Op, inputs: dict[str, Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    """Outputs of op(**inputs) and the gradients of all inputs, by name."""
    outputs = op(**inputs)
    upstream = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient of {name}": value for name, value in zip(inputs, gradients, strict=True)}


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype).clone().requires_grad_() for name, tensor in inputs.items()}


def assert_op_within_budget(
    op: Op, torch_op: Op, reference: Op, inputs: dict[str, Tensor], upstream: list[Tensor]
) -> None:
    """Run the kernel on poisoned memory; hold its outputs and gradients against the budget of testing.py.

    Args:
        op, torch_op, reference: take `inputs` as keywords and return a tuple of outputs: the kernel, what a
            model without it computes in the same type, and the truth, which is given fp64.
        upstream: one gradient per output.
    """
    with nan_poison():
        ours = run(op, inputs, upstream)
    dtype = next(iter(inputs.values())).dtype
    same_dtype = run(torch_op, leaves(inputs, dtype), upstream)
    truth = run(reference, leaves(inputs, torch.float64), upstream)
    for name, value in ours.items():
        factor = {"factor": GRADIENT_FACTOR} if name.startswith("gradient") else {}
        assert_within_budget(name, value, same_dtype[name], truth[name], **factor)


def assert_repeats_equal(op: Op, inputs: dict[str, Tensor], upstream: list[Tensor], repeats: int) -> None:
    """The same bits every time: no atomics, no race."""
    first = run(op, inputs, upstream)
    for _ in range(repeats):
        again = run(op, inputs, upstream)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} differs between two runs"
