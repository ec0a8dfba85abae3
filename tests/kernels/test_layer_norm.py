"""LayerNorm ops against fp64 within the error budget, masks bit for bit, repeats bit-equal."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_repeats_equal, normal, on_device
from torch import Tensor
from torch.nn.functional import layer_norm as torch_layer_norm

from megatron_iml.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    bias_dropout_add,
    bias_dropout_add_reference,
    layer_norm,
    layer_norm_reference,
    layer_norm_residual,
    layer_norm_residual_reference,
)
from megatron_iml.kernels.philox import dropout_key, keep_mask, key_tensor
from megatron_iml.kernels.testing import assert_op_within_budget, run_op

pytest.importorskip("triton", reason="triton is not installed")

# One element, fewer features than a Philox group, a power of two, odd sizes, the width of OPT-125M; rows that
# the backward cuts into chunks, the last of them shorter, and into parts, one of which has a chunk without a
# column. 150 rows are more than the backward's programs have at a time.
SHAPES = [(1, 1), (3, 3), (4, 64), (7, 131), (150, 20), (2, 768), (2, 4099), (3, 8203), (3, 9301)]
# The widths of real models, more rows than programs, the widest row.
GPU_SHAPES = [(1, 2048), (515, 2048), (130, 2560), (1031, 4096), (140, 5120), (33, 7168), (300, 9216)]
GPU_SHAPES += [(300, 12288), (5, 16384), (40000, 130)]
SHAPES += [pytest.param(*shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]
EPS = 1e-5
KEY = dropout_key(1234, row=7, layer=3, place="attention_output")
# Odd, and far from 0: a mask that counted from the tensor's first row would be another.
FIRST_SLOT = 1001


def draw(rows: int, features: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x_TF": normal(rows, features, seed=1, dtype=dtype),
        "x_bias_F": normal(features, seed=2, dtype=dtype, scale=0.5),
        "residual_TF": normal(rows, features, seed=3, dtype=dtype, scale=3.0),
        "weight_F": normal(features, seed=4, dtype=dtype, scale=0.2, shift=1.0),
        "bias_F": normal(features, seed=5, dtype=dtype, scale=0.3),
    }


def upstream(rows: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(rows, features, seed=seed, dtype=dtype).detach() for seed in (6, 7)]


def keep(rows: int, features: int, probability: float) -> Tensor:
    """The mask, bool [rows, features], from the definition."""
    slots = torch.arange(FIRST_SLOT, FIRST_SLOT + rows, device=DEVICE)
    plane = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return keep_mask(KEY, probability, slots, torch.arange(features, device=DEVICE), plane)[0]


def torch_sum(
    probability: float, x_TF: Tensor, x_bias_F: Tensor | None = None, residual_TF: Tensor | None = None
) -> Tensor:
    """What a model without fused ops computes, every step rounded to its type."""
    total_TF = x_TF if x_bias_F is None else x_TF + x_bias_F
    if probability > 0.0:
        total_TF = total_TF * keep(*x_TF.shape, probability) / (1.0 - probability)
    return total_TF if residual_TF is None else residual_TF + total_TF


def torch_add_layer_norm(
    probability: float, x_TF: Tensor, x_bias_F: Tensor, residual_TF: Tensor, weight_F: Tensor, bias_F: Tensor
) -> tuple[Tensor, Tensor]:
    total_TF = torch_sum(probability, x_TF, x_bias_F, residual_TF)
    return torch_layer_norm(total_TF, weight_F.shape, weight_F, bias_F, EPS), total_TF


@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "features"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm(dtype: torch.dtype, rows: int, features: int, probability: float) -> None:
    dropout = {
        "dropout_probability": probability,
        "dropout_key": key_tensor(KEY, DEVICE),
        "first_slot": FIRST_SLOT,
    }
    assert_op_within_budget(
        functools.partial(add_layer_norm, eps=EPS, **dropout),
        functools.partial(torch_add_layer_norm, probability),
        functools.partial(add_layer_norm_reference, eps=EPS, **dropout),
        draw(rows, features, dtype),
        upstream(rows, features, dtype),
    )


@pytest.mark.parametrize(("rows", "features"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: torch.dtype, rows: int, features: int) -> None:
    inputs = draw(rows, features, dtype)
    del inputs["x_bias_F"], inputs["residual_TF"]
    assert_op_within_budget(
        lambda **inputs: (layer_norm(**inputs, eps=EPS),),
        lambda x_TF, weight_F, bias_F: (torch_layer_norm(x_TF, weight_F.shape, weight_F, bias_F, EPS),),
        lambda **inputs: (layer_norm_reference(**inputs, eps=EPS),),
        inputs,
        upstream(rows, features, dtype)[:1],
    )


@pytest.mark.parametrize(("rows", "features"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_residual(dtype: torch.dtype, rows: int, features: int) -> None:
    inputs = draw(rows, features, dtype)
    del inputs["x_bias_F"], inputs["residual_TF"]
    assert_op_within_budget(
        functools.partial(layer_norm_residual, eps=EPS),
        lambda x_TF, weight_F, bias_F: (
            torch_layer_norm(x_TF, weight_F.shape, weight_F, bias_F, EPS),
            x_TF.view_as(x_TF),
        ),
        functools.partial(layer_norm_residual_reference, eps=EPS),
        inputs,
        upstream(rows, features, dtype),
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_may_be_left_unused(used: int) -> None:
    inputs = draw(5, 40, torch.float32)
    x_TF, weight_F, bias_F = (inputs[name] for name in ("x_TF", "weight_F", "bias_F"))
    both = layer_norm_residual(x_TF, weight_F, bias_F, EPS), add_layer_norm(**inputs, eps=EPS)
    expected = (
        layer_norm_residual_reference(x_TF, weight_F, bias_F, EPS),
        add_layer_norm_reference(**inputs, eps=EPS),
    )
    leaves = list(inputs.values())
    for ours, theirs in zip(both, expected, strict=True):
        one, other = (
            torch.autograd.grad(results[used].square().sum(), leaves, allow_unused=True)
            for results in (ours, theirs)
        )
        assert [gradient is None for gradient in one] == [gradient is None for gradient in other]
        for got, wanted in zip(one, other, strict=True):
            if wanted is not None:
                assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_ends_behind_the_op_is_none() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_TF: Tensor) -> Tensor:
            return x_TF.clone()

        @staticmethod
        def backward(ctx: Any, *unused: Tensor) -> None:
            return None

    inputs = draw(2, 8, torch.float32)
    y_TF, total_TF = add_layer_norm(**inputs, eps=EPS)
    gradients = torch.autograd.grad(
        Stop.apply(y_TF).sum() + Stop.apply(total_TF).sum(), list(inputs.values()), allow_unused=True
    )
    assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("names", [("x_bias_F", "residual_TF"), ("residual_TF",), ("x_bias_F",), ()])
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_dropout_add(dtype: torch.dtype, probability: float, names: tuple[str, ...]) -> None:
    if not names and probability == 0.0:
        pytest.skip("nothing to do: the op returns its input")
    key = key_tensor(KEY, DEVICE)
    absent: dict[str, None] = {name: None for name in ("x_bias_F", "residual_TF") if name not in names}
    arguments = {"dropout_probability": probability, "dropout_key": key, "first_slot": FIRST_SLOT, **absent}
    inputs = {name: tensor for name, tensor in draw(9, 130, dtype).items() if name in ("x_TF", *names)}
    assert_op_within_budget(
        lambda **inputs: (bias_dropout_add(**inputs, **arguments),),
        lambda **inputs: (torch_sum(probability, **inputs),),
        lambda **inputs: (bias_dropout_add_reference(**inputs, **arguments),),
        inputs,
        upstream(9, 130, dtype)[:1],
    )


def test_the_mask_is_the_definition_bit_for_bit_forward_and_backward() -> None:
    x_TF = torch.ones(33, 257, device=DEVICE, requires_grad=True)
    dropped_TF = bias_dropout_add(x_TF, None, None, 0.4, key_tensor(KEY, DEVICE), FIRST_SLOT)
    (d_x_TF,) = torch.autograd.grad(dropped_TF.sum(), x_TF)
    # Forward and backward of ones are the mask times its factor, in one rounding each.
    expected_TF = keep(33, 257, 0.4) * torch.tensor(1.0 / 0.6, dtype=torch.float32)
    assert torch.equal(dropped_TF, expected_TF)
    assert torch.equal(d_x_TF, expected_TF)
    # 8,481 draws: their share has a standard deviation of 0.005.
    assert abs(float((dropped_TF == 0).float().mean()) - 0.4) < 0.02


def test_a_slice_of_the_slots_draws_its_part_of_the_mask() -> None:
    """Sequence parallelism: each rank has some slots and says where they begin."""
    inputs = list(draw(10, 66, torch.float32).values())
    key = key_tensor(KEY, DEVICE)
    whole = add_layer_norm(*inputs, EPS, 0.5, key, 0)
    x_TF, x_bias_F, residual_TF, *affine = inputs
    parts = [
        add_layer_norm(x_TF[part], x_bias_F, residual_TF[part], *affine, EPS, 0.5, key, part.start)
        for part in (slice(0, 4), slice(4, 10))
    ]
    for index in range(2):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


def test_statistics_survive_a_large_mean() -> None:
    inputs = draw(5, 300, torch.float32)
    # E[x^2] - mean^2 would lose 24 bits of the variance here, all that fp32 has.
    inputs["residual_TF"] = normal(5, 300, seed=3, dtype=torch.float32, shift=4096.0)
    assert_op_within_budget(
        functools.partial(add_layer_norm, eps=EPS),
        functools.partial(torch_add_layer_norm, 0.0),
        functools.partial(add_layer_norm_reference, eps=EPS),
        inputs,
        upstream(5, 300, torch.float32),
    )


def test_a_nan_stays_in_its_row() -> None:
    inputs, gradients = draw(6, 70, torch.float32), upstream(6, 70, torch.float32)
    op = functools.partial(add_layer_norm, eps=EPS)
    clean = run_op(op, inputs, gradients)
    with torch.no_grad():
        inputs["x_TF"][2, 5] = float("nan")
    spoilt = run_op(op, inputs, gradients)
    others = [0, 1, 3, 4, 5]
    # Not the gradients of biases and weights: their sums are over rows, so a NaN belongs there.
    for name in ("output 0", "output 1", "gradient of x_TF", "gradient of residual_TF"):
        assert torch.equal(clean[name][others], spoilt[name][others])
    assert spoilt["output 0"][2].isnan().all()


def test_leading_dimensions_and_no_rows() -> None:
    inputs = list(draw(6, 40, torch.float32).values())
    flat = add_layer_norm(*inputs, EPS)
    x_TF, x_bias_F, residual_TF, *affine = inputs
    shaped = add_layer_norm(x_TF.view(6, 1, 40), x_bias_F, residual_TF.view(6, 1, 40), *affine, EPS)
    for one, other in zip(flat, shaped, strict=True):
        assert torch.equal(one[:, None], other)
        # A pipeline frees an output that it has sent, and refuses a view.
        assert other._base is None
    # Sums over no rows: zeros that somebody has to write.
    empty = add_layer_norm(x_TF[:0], x_bias_F, residual_TF[:0], *affine, EPS)
    gradients = torch.autograd.grad(empty, [x_TF, x_bias_F, affine[0]], [empty[0].detach()] * 2)
    assert all(not gradient.any() for gradient in gradients)


def test_only_the_sum_and_two_numbers_a_row_are_kept() -> None:
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    inputs = draw(8, 100, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        add_layer_norm(**inputs, eps=EPS, dropout_probability=0.1, dropout_key=key_tensor(KEY, DEVICE))
    assert sorted(kept) == [1, 8, 8, 100, 8 * 100]  # key, mean, rstd, weight, new_residual


@pytest.mark.parametrize("op", [bias_dropout_add, add_layer_norm])
def test_leaves_do_not_share_the_memory_of_a_gradient(op: Callable[..., Any]) -> None:
    # Without dropout the gradients of x and of the residual are the same numbers; without a norm they are the
    # ones that came in.
    inputs = draw(3, 8, torch.float32)
    if op is bias_dropout_add:
        outputs = op(inputs["x_TF"], None, inputs["residual_TF"])
    else:
        outputs, _ = op(**inputs, eps=EPS)
    upstream_TF = torch.ones_like(outputs)
    outputs.backward(upstream_TF, retain_graph=True)
    x_TF, residual_TF = inputs["x_TF"], inputs["residual_TF"]
    once_TF = x_TF.grad.clone()
    assert torch.equal(once_TF, residual_TF.grad)
    assert len({tensor.data_ptr() for tensor in (x_TF.grad, residual_TF.grad, upstream_TF)}) == 3
    # A second backward adds in place: where memory is shared, it adds twice.
    outputs.backward(upstream_TF)
    assert torch.equal(x_TF.grad, 2 * once_TF)
    assert torch.equal(residual_TF.grad, 2 * once_TF)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    rows, repeats = (5000, 50) if DEVICE.type == "cuda" else (40, 2)
    dropout = {"dropout_probability": 0.1, "dropout_key": key_tensor(KEY, DEVICE)}
    op = functools.partial(add_layer_norm, eps=EPS, **dropout)
    assert_repeats_equal(op, draw(rows, 200, dtype), upstream(rows, 200, dtype), repeats)


@pytest.mark.parametrize(
    ("change", "first_line"),
    [
        ({"residual_TF": torch.zeros(4, 7)}, r"add_layer_norm: residual is \(4, 7\).* must be \(4, 8\)"),
        (
            {"weight_F": torch.zeros(8, dtype=torch.float16)},
            r"weight is .*float16 .* must be .*float32",
        ),
        ({"x_TF": torch.zeros(8, 4).t()}, r"x is .* with gaps in memory.*\.contiguous\(\)"),
        ({"x_TF": torch.zeros(4, 8, dtype=torch.float64)}, r"got torch.float64; allowed: .*_reference"),
        ({"dropout_probability": 1.0}, r"dropout_probability is 1.0; allowed"),
        (
            {"dropout_probability": 0.1},
            r"dropout_probability is 0.1 without a dropout_key; allowed: an int64",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict, first_line: str) -> None:
    change = {name: on_device(value) for name, value in change.items()}
    with pytest.raises(ValueError, match=first_line):
        add_layer_norm(**(draw(4, 8, torch.float32) | {"eps": EPS} | change))
