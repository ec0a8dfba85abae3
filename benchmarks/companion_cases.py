"""The elementwise companions as `companions.py` measures them: ours, torch's own, the truth and their inputs.

    for case in elementwise_cases(2048):      # layer_norm, layer_norm_residual, add_layer_norm, ...
        case.op(**case.inputs)

T slots, F features.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as torch_layer_norm

from megatron_iml.kernels.bias_relu import bias_relu, bias_relu_reference
from megatron_iml.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    bias_dropout_add_reference,
    layer_norm,
    layer_norm_reference,
    layer_norm_residual,
    layer_norm_residual_reference,
)
from megatron_iml.kernels.philox import key_tensor
from megatron_iml.kernels.testing import Op

SLOTS = 16384
EPS = 1e-5
DROPOUT = 0.1
DTYPE = torch.bfloat16
KEY = 0x0123456789ABCDEF


@dataclass(frozen=True)
class Case:
    """An elementwise op at one width. The op, torch's own and the truth take `inputs` as keywords."""

    name: str
    features: int
    op: Op
    torch_op: Op
    reference: Op
    inputs: dict[str, Tensor]
    upstream: list[Tensor]
    forward_passes: int
    """Tensors of [slots, features] that the forward must read or write."""
    backward_passes: int


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Random bf16 numbers that need a gradient."""
    return (torch.randn(*shape, device="cuda") * scale + shift).to(DTYPE).requires_grad_()


def torch_add_layer_norm(
    x_TF: Tensor, x_bias_F: Tensor, residual_TF: Tensor, weight_F: Tensor, bias_F: Tensor
) -> tuple[Tensor, Tensor]:
    """Bias, addition and norm as torch runs them, one kernel each."""
    new_residual_TF = residual_TF + (x_TF + x_bias_F)
    return torch_layer_norm(new_residual_TF, weight_F.shape, weight_F, bias_F, EPS), new_residual_TF


def torch_add_layer_norm_dropout(
    keep_TF: Tensor,
    x_TF: Tensor,
    x_bias_F: Tensor,
    residual_TF: Tensor,
    weight_F: Tensor,
    bias_F: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same with a mask that is given: drawing it costs torch nothing here."""
    new_residual_TF = torch.addcmul(residual_TF, x_TF + x_bias_F, keep_TF, value=1.0 / (1.0 - DROPOUT))
    return torch_layer_norm(new_residual_TF, weight_F.shape, weight_F, bias_F, EPS), new_residual_TF


def elementwise_cases(features: int) -> Iterator[Case]:
    """The elementwise ops at one model width; bias_relu works on four times the width."""
    # Made when asked for: at 12,288 features the tensors of a case are 2 GB.
    yield layer_norm_case(features)
    yield layer_norm_residual_case(features)
    yield add_layer_norm_case(features)
    yield add_layer_norm_dropout_case(features)
    yield bias_relu_case(4 * features)


def affine(features: int) -> dict[str, Tensor]:
    """Weights near 1 and biases near 0, as trained ones are; all equal would hide a wrong index."""
    return {"weight_F": normal(features, scale=0.2, shift=1.0), "bias_F": normal(features, scale=0.3)}


def sum_inputs(features: int) -> dict[str, Tensor]:
    """What `add_layer_norm` takes; the residual is the largest of the sums, as deep in a trained model."""
    x_TF, residual_TF = normal(SLOTS, features), normal(SLOTS, features, scale=3.0)
    return {"x_TF": x_TF, "x_bias_F": normal(features), "residual_TF": residual_TF} | affine(features)


def upstream(features: int, outputs: int) -> list[Tensor]:
    """Gradients of so many outputs."""
    return [normal(SLOTS, features).detach() for _ in range(outputs)]


def layer_norm_case(features: int) -> Case:
    """The norm alone: at the end of a model."""
    return Case(
        "layer_norm",
        features,
        lambda **inputs: (layer_norm(**inputs, eps=EPS),),
        lambda x_TF, weight_F, bias_F: (torch_layer_norm(x_TF, weight_F.shape, weight_F, bias_F, EPS),),
        lambda **inputs: (layer_norm_reference(**inputs, eps=EPS),),
        {"x_TF": normal(SLOTS, features)} | affine(features),
        upstream(features, 1),
        forward_passes=2,
        backward_passes=3,
    )


def layer_norm_residual_case(features: int) -> Case:
    """The first norm of a layer; torch's autograd adds the two gradients."""
    return Case(
        "layer_norm_residual",
        features,
        functools.partial(layer_norm_residual, eps=EPS),
        lambda x_TF, weight_F, bias_F: (
            torch_layer_norm(x_TF, weight_F.shape, weight_F, bias_F, EPS),
            x_TF.view_as(x_TF),
        ),
        functools.partial(layer_norm_residual_reference, eps=EPS),
        {"x_TF": normal(SLOTS, features)} | affine(features),
        upstream(features, 2),
        forward_passes=2,
        backward_passes=4,
    )


def add_layer_norm_case(features: int) -> Case:
    """The second norm of a layer."""
    return Case(
        "add_layer_norm",
        features,
        functools.partial(add_layer_norm, eps=EPS),
        torch_add_layer_norm,
        functools.partial(add_layer_norm_reference, eps=EPS),
        sum_inputs(features),
        upstream(features, 2),
        forward_passes=4,
        backward_passes=4,
    )


def add_layer_norm_dropout_case(features: int) -> Case:
    """The same with dropout."""
    dropout = {"dropout_probability": DROPOUT, "dropout_key": key_tensor(KEY, torch.device("cuda"))}
    inputs = sum_inputs(features)
    ones_TF = torch.ones_like(inputs["x_TF"], requires_grad=False)
    # The op's own mask, so that torch's result is comparable: dropout of ones is 0 where it drops.
    keep_TF = (bias_dropout_add_reference(ones_TF, None, None, **dropout) != 0).to(DTYPE)
    return Case(
        "add_layer_norm, dropout 0.1",
        features,
        functools.partial(add_layer_norm, eps=EPS, **dropout),
        functools.partial(torch_add_layer_norm_dropout, keep_TF),
        functools.partial(add_layer_norm_reference, eps=EPS, **dropout),
        inputs,
        upstream(features, 2),
        forward_passes=4,
        backward_passes=5,
    )


def bias_relu_case(features: int) -> Case:
    """bias_relu at the width of a feed-forward."""
    return Case(
        "bias_relu",
        features,
        lambda **inputs: (bias_relu(**inputs),),
        lambda x_TF, bias_F: (torch.relu(x_TF + bias_F),),
        lambda **inputs: (bias_relu_reference(**inputs),),
        {"x_TF": normal(SLOTS, features), "bias_F": normal(features)},
        upstream(features, 1),
        forward_passes=2,
        backward_passes=3,
    )
