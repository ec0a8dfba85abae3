"""bias_relu against fp64 within the error budget, its treatment of zero and NaN, repeats bit-equal."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_repeats_equal, normal
from torch import Tensor

from megatron_iml.kernels.bias_relu import (
    bias_relu,
    bias_relu_reference,
    relu_gradient,
    relu_gradient_reference,
)
from megatron_iml.kernels.testing import assert_op_within_budget

pytest.importorskip("triton", reason="triton is not installed")

# One element, odd sizes on both sides of a tile of columns, more rows than one tile.
SHAPES = [(1, 1), (5, 37), (9, 1025), (70, 130)]
GPU_SHAPES = [(1, 8192), (1000, 16384), (777, 49152), (20000, 1026)]
SHAPES += [pytest.param(*shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]


def draw(rows: int, features: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs and the gradient of the output."""
    inputs = {
        "x_TF": normal(rows, features, seed=1, dtype=dtype),
        "bias_F": normal(features, seed=2, dtype=dtype, scale=0.5),
    }
    return inputs, [normal(rows, features, seed=3, dtype=dtype).detach()]


def op(**inputs: Tensor) -> tuple[Tensor]:
    return (bias_relu(**inputs),)


@pytest.mark.parametrize(("rows", "features"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(dtype: torch.dtype, rows: int, features: int) -> None:
    inputs, upstream = draw(rows, features, dtype)
    assert_op_within_budget(
        op,
        lambda x_TF, bias_F: (torch.relu(x_TF + bias_F),),
        lambda **inputs: (bias_relu_reference(**inputs),),
        inputs,
        upstream,
    )


def test_zero_stops_the_gradient_and_nan_passes() -> None:
    # With the bias of 1: below 0, 0 itself, above 0. The kernels compare so that NaN falls through.
    nan = float("nan")
    x_TF = torch.tensor([[-2.0, -1.0, 0.0, 1.0, nan]], device=DEVICE, requires_grad=True)
    bias_F = torch.ones(5, device=DEVICE, requires_grad=True)
    y_TF = bias_relu(x_TF, bias_F)
    torch.testing.assert_close(y_TF.cpu(), torch.tensor([[0.0, 0.0, 1.0, 2.0, nan]]), equal_nan=True)
    d_x_TF, d_bias_F = torch.autograd.grad(y_TF, (x_TF, bias_F), torch.full_like(y_TF, 3.0))
    assert d_x_TF.tolist() == [[0.0, 0.0, 3.0, 3.0, 3.0]]
    assert d_bias_F.tolist() == [0.0, 0.0, 3.0, 3.0, 3.0]


def test_leading_dimensions_and_no_rows() -> None:
    inputs, _ = draw(6, 40, torch.float32)
    x_TF, bias_F = inputs.values()
    assert torch.equal(bias_relu(x_TF.view(6, 1, 40), bias_F).squeeze(1), bias_relu(x_TF, bias_F))
    empty = bias_relu(x_TF[:0], bias_F)
    assert empty.shape == (0, 40)
    # Written zeros, not what the memory held: the kernel runs once even so.
    assert not torch.autograd.grad(empty.sum(), bias_F)[0].any()


@pytest.mark.parametrize("op", [bias_relu, relu_gradient])
def test_the_gradient_of_a_sum(op: Callable[..., Tensor]) -> None:
    # It arrives as one number with strides of 0, which a kernel would take for a matrix.
    inputs, _ = draw(6, 40, torch.float32)
    y_TF = op(*inputs.values())
    d_x_TF, d_bias_F = torch.autograd.grad(y_TF.sum(), tuple(inputs.values()))
    assert torch.equal(d_x_TF, (y_TF > 0).float())
    assert torch.equal(d_bias_F, (y_TF > 0).float().sum(0))


def test_only_the_output_is_kept() -> None:
    inputs, _ = draw(6, 40, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: _):
        y_TF = bias_relu(**inputs)
    # The output's own memory, not a copy, and nothing of the input.
    assert kept == [y_TF.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    # Races need many programs at once: only a GPU has them, so there it is tried more often.
    rows, repeats = (5000, 50) if DEVICE.type == "cuda" else (40, 2)
    assert_repeats_equal(op, *draw(rows, 200, dtype), repeats)


def test_another_bias_is_refused() -> None:
    x_TF = torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"bias_relu: bias is \(7,\).* must be \(8,\)"):
        bias_relu(x_TF, torch.zeros(7, device=DEVICE))


@pytest.mark.parametrize("op", [relu_gradient, relu_gradient_reference])
def test_the_gradient_alone_is_that_of_bias_relu(op: Callable[..., Tensor]) -> None:
    inputs, upstream = draw(9, 1025, torch.float32)
    y_TF = bias_relu(**inputs)
    wanted = torch.autograd.grad(y_TF, tuple(inputs.values()), upstream)
    leaf_TF, bias_F = y_TF.detach().requires_grad_(), inputs["bias_F"]
    same_TF = op(leaf_TF, bias_F)
    # Nothing is computed forward, not even a copy.
    assert same_TF.data_ptr() == leaf_TF.data_ptr()
    d_x_TF, d_bias_F = torch.autograd.grad(same_TF, (leaf_TF, bias_F), upstream)
    assert torch.equal(d_x_TF, wanted[0])
    # The reference adds nine rows up in another order.
    torch.testing.assert_close(d_bias_F, wanted[1], rtol=1e-6, atol=1e-5)
