"""The companions under torch.compile: one graph, the same bits, and fakes that say what launches return."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, normal
from torch import Tensor, library

from megatron_iml.kernels.bias_relu import bias_relu, relu_gradient
from megatron_iml.kernels.bias_relu import op as bias_relu_op
from megatron_iml.kernels.document_attention import DocumentBounds
from megatron_iml.kernels.document_attention import op as attention_op
from megatron_iml.kernels.document_attention.bounds import whole_tiles
from megatron_iml.kernels.layer_norm import add_layer_norm, bias_dropout_add, layer_norm_residual
from megatron_iml.kernels.layer_norm import op as layer_norm_op
from megatron_iml.kernels.philox import key_tensor
from megatron_iml.kernels.target_loss import op as target_loss_op
from megatron_iml.kernels.target_loss import target_loss
from megatron_iml.kernels.testing import documents_end
from megatron_iml.kernels.weight_gradient import _accumulate, accumulate_weight_gradient

pytest.importorskip("triton", reason="triton is not installed")

T, F, V = 5, 24, 40
# Row 3 has two targets, as a prefix that two documents share; id 39 is the vocabulary's last.
ROWS, IDS = torch.tensor([3, 0, 3, 1], device=DEVICE), torch.tensor([7, 39, 0, 7], device=DEVICE)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate(shapes)]


def plain(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [tensor.detach() for tensor in draw(*shapes)]


def key(value: int = 5) -> Tensor:
    return key_tensor(value, DEVICE)


BOUNDS = DocumentBounds.from_end(documents_end([3, 2]).to(DEVICE))
# As the op passes them: scale, dropout, first head, width of a key tile.
NUMBERS = (0.5, 0.1, 3, BOUNDS.schedule.columns)
# Above 0: the statistics of a softmax are divided by.
STATISTICS = torch.rand(3, 4, device=DEVICE) + 1.0
LAUNCHES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "layer_norm": (
        layer_norm_op._forward,
        (*plain((T, F)), None, None, *plain((F,), (F,)), 1e-5, 0.0, None, 0),
    ),
    "add_layer_norm": (
        layer_norm_op._forward,
        (*plain((T, F), (F,), (T, F), (F,), (F,)), 1e-5, 0.1, key(), 3),
    ),
    "dropout alone": (layer_norm_op._forward, (*plain((T, F)), *(None,) * 4, 0.0, 0.1, key(), 3)),
    "layer_norm backward": (
        layer_norm_op._backward,
        (*plain((T, F)), None, *plain((T, F), (T,), (T,), (F,)), False, 0.0, None, 0),
    ),
    "add_layer_norm backward": (
        layer_norm_op._backward,
        (*plain((T, F), (T, F), (T, F), (T,), (T,), (F,)), True, 0.1, key(), 3),
    ),
    "bias alone backward": (
        layer_norm_op._backward,
        (None, *plain((T, F)), *(None,) * 4, True, 0.0, None, 0),
    ),
    "bias_relu": (bias_relu_op._forward, tuple(plain((T, F), (F,)))),
    "bias_relu backward": (bias_relu_op._backward, tuple(plain((T, F), (T, F)))),
    "target statistics": (
        target_loss_op._fill_statistics,
        (*plain((4, V), (4, F), (V, F)), IDS, torch.full((), 2.0, device=DEVICE), 3, True),
    ),
    "target gradient": (target_loss_op._to_gradient, (*plain((4, V)), IDS, STATISTICS, None, 0)),
    "target hidden gradient": (target_loss_op._hidden_gradient, tuple(plain((4, F), (4, V), (V, F)))),
    "target scatter": (
        target_loss_op._scatter,
        (*plain((4, F)), ROWS, torch.full((), 0.5, device=DEVICE), T),
    ),
    "attention": (
        attention_op._forward,
        (*plain((T, 2, 3, 8)), BOUNDS.end_T, BOUNDS.schedule.tensors(), key(), *NUMBERS),
    ),
    "attention backward": (
        attention_op._backward,
        (
            *plain((T, 2, 8), (T, 2, 3, 8), (T, 2, 8), (2, whole_tiles(T))),
            BOUNDS.end_T,
            BOUNDS.schedule.tensors(),
            key(),
            *NUMBERS,
        ),
    ),
    "weight gradient": (_accumulate, tuple(plain((V, F), (T, V), (T, F)))),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_is_what_it_is_registered_as(name: str) -> None:
    launch, arguments = LAUNCHES[name]
    # Its schema names what it writes to; its fake returns the shapes, types and strides of the real results.
    library.opcheck(launch, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow  # importing the compiler takes half a minute
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_can_be_compiled_for_any_size(name: str) -> None:
    launch, arguments = LAUNCHES[name]
    library.opcheck(launch, arguments)


def loss_of_layer(inputs: list[Tensor], key: Tensor) -> Tensor:
    """All ops of a layer in a row."""
    x_TF, bias_F, weight_F, norm_bias_F = inputs
    y_TF, residual_TF = layer_norm_residual(x_TF, weight_F, norm_bias_F, 1e-5)
    y_TF, total_TF = add_layer_norm(y_TF, bias_F, residual_TF, weight_F, norm_bias_F, 1e-5, 0.1, key, 7)
    y_TF = relu_gradient(bias_relu(y_TF, bias_F), bias_F)
    return bias_dropout_add(y_TF, bias_F, total_TF, 0.2, key, 7).square().sum()


def loss_of_targets(inputs: list[Tensor], scale: Tensor, **settings: Any) -> Tensor:
    hidden_TF, weight_VF = inputs
    return target_loss(hidden_TF, weight_VF, ROWS, IDS, loss_scale=scale, chunk=3, **settings)[0] * scale


def same_bits(loss: Callable[..., Tensor], inputs: list[Tensor], *rest: Any, **settings: Any) -> None:
    """One graph without a break, and in it the bits of the eager op, forward and backward."""
    # aot_eager traces forward and backward and runs the same operators: their bits are the eager ones.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(inputs, *rest, **settings), compiled(inputs, *rest, **settings)
    assert torch.equal(expected, got)
    gradients = [torch.autograd.grad(value, inputs) for value in (expected, got)]
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)
        # Gradients that never came would be equal too.
        assert eager.any()


@pytest.mark.slow
def test_a_layer_is_one_graph() -> None:
    inputs = draw((T, F), (F,), (F,), (F,))
    # Two keys: a graph that had kept the first would draw its masks again.
    for value in (1, 2):
        same_bits(loss_of_layer, inputs, key(value))


@pytest.mark.slow
def test_target_loss_is_one_graph() -> None:
    inputs, scale = draw((T, F), (V, F)), torch.full((), 4.0, device=DEVICE)
    same_bits(loss_of_targets, inputs, scale)


@pytest.mark.slow
def test_target_loss_over_a_group_is_one_graph() -> None:
    # As if a second rank had the same logits: the maximum stays, sums double.
    inputs, scale = draw((T, F), (V, F)), torch.full((), 4.0, device=DEVICE)
    group = {"group_max": lambda x: x.add_(0.0), "group_sum": lambda x: x.mul_(2.0)}
    same_bits(loss_of_targets, inputs, scale, **group)


@pytest.mark.slow
def test_buffers_are_added_to_inside_a_graph() -> None:
    hidden_TF, weight_VF = draw((T, F), (V, F))
    buffers = [torch.ones(V, F, device=DEVICE) for _ in range(2)]
    scale = torch.full((), 4.0, device=DEVICE)

    def step(hidden_TF: Tensor, weight_VF: Tensor, buffer_VF: Tensor) -> Tensor:
        loss = loss_of_targets([hidden_TF, weight_VF], scale, weight_grad_VF=buffer_VF)
        # Any gradient of the outputs does.
        accumulate_weight_gradient(buffer_VF, (hidden_TF @ weight_VF.t()).detach(), hidden_TF.detach())
        return loss

    eager = step(hidden_TF, weight_VF, buffers[0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden_TF, weight_VF, buffers[1])
    assert torch.equal(eager, compiled)
    assert torch.equal(*buffers)
    assert not torch.equal(buffers[0], torch.ones_like(buffers[0]))
