"""Our Adam is torch's, to the bit; only the place of its step count differs."""

import copy
from typing import Any

import torch
from torch import Tensor

from megatron_iml.training.adam import Adam

BETAS, EPS = (0.9, 0.95), 1e-6
SHAPES = [(7, 5), (3,), (11,)]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    # From nearly nothing, where eps decides, to large.
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 9 - 7) for shape in SHAPES]


def groups(params: list[Tensor]) -> list[dict[str, Any]]:
    """As megatron-core makes them: matrices decay, vectors do not."""
    return [
        {"params": params[:1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": params[1:], "lr": 3e-3, "weight_decay": 0.0},
    ]


def take_step(optimizer: torch.optim.Optimizer, params: list[Tensor], step: int) -> None:
    for param, gradient in zip(params, gradients(step), strict=True):
        param.grad = gradient
    for group in optimizer.param_groups:
        group["lr"] *= 0.9
    optimizer.step()


def test_same_bits_as_torchs_adamw() -> None:
    ours, theirs = parameters(), parameters()
    adam = Adam(groups(ours), BETAS, EPS)
    adamw = torch.optim.AdamW(groups(theirs), betas=BETAS, eps=EPS, fused=True)
    for step in range(20):
        take_step(adam, ours, step)
        take_step(adamw, theirs, step)
        for param, other in zip(ours, theirs, strict=True):
            assert torch.equal(param, other), f"step {step}"
    assert [group["step"] for group in adam.param_groups] == [20, 20]


def test_the_formula_in_double_precision() -> None:
    params = [param.double() for param in parameters()]
    truth = [param.clone() for param in params]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    adam = Adam(groups(params), BETAS, EPS)
    for step in range(1, 6):
        for param, gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient.double()
        adam.step()
        for index, (first, second) in enumerate(moments):
            gradient = gradients(step)[index].double()
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.95).add_(gradient**2, alpha=0.05)
            rate, decay = (1e-2, 0.1) if index == 0 else (3e-3, 0.0)
            direction = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + EPS)
            truth[index] -= rate * (decay * truth[index] + direction)
    for param, expected in zip(params, truth, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_gradient_stays_and_one_may_be_a_view() -> None:
    buffer = torch.ones(6, requires_grad=True)
    # megatron-core's shards are views into a buffer, not leaves.
    view, idle = buffer[:3].detach(), torch.ones(2)
    adam = Adam([{"params": [view, idle], "lr": 0.5, "weight_decay": 0.0}], BETAS, EPS)
    view.grad = torch.ones(3)
    adam.step()
    torch.testing.assert_close(buffer.detach(), torch.tensor([0.5] * 3 + [1.0] * 3), rtol=0, atol=2e-6)
    assert torch.equal(idle, torch.ones(2))


def test_state_goes_out_and_comes_back() -> None:
    params = parameters()
    adam = Adam(groups(params), BETAS, EPS)
    for step in range(3):
        take_step(adam, params, step)
    state = adam.state_dict()
    # megatron-core reads one step per parameter, as torch writes it.
    assert [float(entry["step"]) for entry in state["state"].values()] == [3.0, 3.0, 3.0]
    copies = [param.clone() for param in params]
    other = Adam(groups(copies), BETAS, EPS)
    # torch's state_dict shares its tensors with the optimizer.
    other.load_state_dict(copy.deepcopy(state))
    # The rate is the schedule's, set before every step.
    for group, resumed_group in zip(adam.param_groups, other.param_groups, strict=True):
        resumed_group["lr"] = group["lr"]
    for step in range(3, 6):
        take_step(adam, params, step)
        take_step(other, copies, step)
    for param, resumed in zip(params, copies, strict=True):
        assert torch.equal(param, resumed)
    assert all("step" not in entry for entry in other.state.values())


def test_a_resumed_run_follows_its_own_configuration() -> None:
    params = parameters()
    adam = Adam(groups(params), BETAS, EPS)
    take_step(adam, params, 0)
    other = Adam([{**group, "weight_decay": 0.3} for group in groups(parameters())], (0.8, 0.9), 1e-8)
    other.load_state_dict(copy.deepcopy(adam.state_dict()))
    for group in other.param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.8, 0.9), 1e-8)
        assert group["step"] == 1


def test_state_exists_before_the_first_step() -> None:
    """A checkpoint is loaded into a fresh process, whose optimizer must already have moments to fill."""
    state = Adam(groups(parameters()), BETAS, EPS).state_dict()["state"]
    assert len(state) == 3
    for entry in state.values():
        assert entry["exp_avg"].abs().max() == entry["exp_avg_sq"].abs().max() == entry["step"] == 0


def test_the_factor_is_on_the_gradients() -> None:
    ours, theirs = parameters(), parameters()
    adam, plain = Adam(groups(ours), BETAS, EPS), Adam(groups(theirs), BETAS, EPS)
    # A power of two, so that scaling rounds nothing; eps keeps Adam from being blind to it.
    for step, factor in enumerate((0.25, 0.25, None, 0.25, None)):
        # For one update at a time: where it is not given, gradients are as they are.
        if factor is not None:
            adam.gradient_factor = factor
        for param, other, gradient in zip(ours, theirs, gradients(step), strict=True):
            param.grad, other.grad = gradient.clone(), (factor or 1.0) * gradient
        adam.step()
        plain.step()
        for param, other in zip(ours, theirs, strict=True):
            assert torch.equal(param, other), f"step {step}"
