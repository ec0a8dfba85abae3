"""The bias and the ReLU that the GEMM takes along, against plain torch; what the linears refuse."""

import pytest
import runs
import torch
from torch import Tensor

from megatron_iml.kernels.bias_relu import relu_gradient_reference


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input [7, 1, 32], weight of fc1, bias, and the output's gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 1, 32), (128, 32), (128,), (7, 1, 128)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("place", ["qkv", "fc1"])
def test_output_and_gradients_are_those_of_plain_torch(place: str) -> None:
    with runs.alone(runs.run_config(hidden_size=32, ffn_hidden_size=128)) as engine:
        layer = engine.chunks[0].decoder.layers[0]
        linear = layer.self_attention.linear_qkv if place == "qkv" else layer.mlp.linear_fc1
        x_T1F, *_ = leaves()
        with torch.no_grad():
            linear.bias.normal_()
        output, bias = linear(x_T1F)
        plain = torch.nn.functional.linear(x_T1F, linear.weight, linear.bias)
        expected = torch.relu(plain) if place == "fc1" else plain
        assert bias is None
        torch.testing.assert_close(output, expected)
        inputs = (x_T1F, linear.weight, linear.bias)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
        found = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
        for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_nan_passes_the_relu() -> None:
    with runs.alone(runs.run_config()) as engine:
        linear = engine.chunks[0].decoder.layers[0].mlp.linear_fc1
        x_T1F = torch.zeros(3, 1, linear.weight.shape[1])
        x_T1F[1, 0, 0] = float("nan")
        output, _ = linear(x_T1F)
        assert output.isnan().any(-1)[:, 0].tolist() == [False, True, False]
        assert output[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_passes_the_gemms_own_relu(dtype: torch.dtype, place: int) -> None:
    operands = [tensor.detach().cuda() for tensor in leaves(dtype)[:3]]
    operands[place].view(-1)[0] = float("nan")
    x_T1F, weight, bias = operands
    fused = torch._addmm_activation(bias, x_T1F[:, 0], weight.t())
    plain = torch.relu(torch.nn.functional.linear(x_T1F[:, 0], weight, bias))
    assert torch.equal(fused.isnan(), plain.isnan())
    assert fused.isnan().any()


def test_a_frozen_weight_is_refused_in_words() -> None:
    with runs.alone(runs.run_config()) as engine:
        linear = engine.chunks[0].decoder.layers[0].mlp.linear_fc1
        linear.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="got a frozen one"):
            linear(torch.zeros(3, 1, linear.weight.shape[1]))


def test_the_reference_of_the_relus_gradient_lets_nan_pass() -> None:
    y_TF = torch.tensor([[0.0, 2.0, float("nan")]], requires_grad=True)
    bias_F = torch.zeros(3, requires_grad=True)
    d_y, d_bias = torch.autograd.grad(
        relu_gradient_reference(y_TF, bias_F), (y_TF, bias_F), torch.full_like(y_TF, 3.0)
    )
    assert d_y.tolist() == [[0.0, 3.0, 3.0]]
    assert d_bias.tolist() == [0.0, 3.0, 3.0]
