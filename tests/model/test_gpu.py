"""The whole model on a GPU with the Triton kernels: the reference's losses and gradients, isolation,
parity."""

import dataclasses

import numpy as np
import pytest
import runs
import torch

from megatron_iml.config import Config
from megatron_iml.model.parameters import named_global_parameters
from megatron_iml.training.engine import Engine
from megatron_iml.training.self_test import run_self_test
from megatron_iml.training.step import train_step

pytestmark = pytest.mark.gpu

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}


def config(backend: str, precision: str, **model: object) -> Config:
    """Two heads of 64, as OPT's small sizes."""
    shape = {"hidden_size": 128, "num_attention_heads": 2, "init_method_std": 0.05}
    return runs.run_config(precision, kernel_backend=backend, **shape | model)


def losses_and_gradients(engine: Engine) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per-target losses of one step's rows, and the fp32 gradient buffers."""
    rows = runs.deal(runs.rows_of_step(0, 96), engine.layout)
    engine.zero_gradients()
    losses = engine.run(rows.micro_batches(engine.layout), len(rows.rows), forward_only=False)
    gradients = {name: p.main_grad.clone() for name, p in named_global_parameters(engine.chunks)}
    return torch.cat(losses).double(), gradients


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_triton_gives_the_references_losses_and_gradients_with_dropout_on(precision: str) -> None:
    with runs.alone(config("reference", "fp32", **DROPOUT)) as engine:
        true_losses, true_gradients = losses_and_gradients(engine)
    errors = {}
    for backend in ("reference", "triton"):
        with runs.alone(config(backend, precision, **DROPOUT)) as engine:
            losses, gradients = losses_and_gradients(engine)
        scale = 128.0 if precision == "fp16" else 1.0
        errors[backend] = {"losses": relative(losses, true_losses)}
        for name, gradient in gradients.items():
            errors[backend][name] = relative(gradient / scale, true_gradients[name])
    wrong = []
    for name, error in errors["triton"].items():
        # Forward error at most 2x, gradients 3x of plain torch in the same type; in fp32 both are rounding.
        allowed = max((2 if name == "losses" else 3) * errors["reference"][name], 2e-5)
        if not error <= allowed:
            wrong.append(f"{name}: {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_document_sees_another(precision: str) -> None:
    with runs.alone(config("triton", precision, **DROPOUT)) as engine:
        run_self_test(engine)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_step_repeats_bit_for_bit(backend: str) -> None:
    outcomes = []
    for _ in range(2):
        with runs.alone(config(backend, "bf16", **DROPOUT)) as engine:
            rows = runs.deal(runs.rows_of_step(0, 96), engine.layout)
            # Compared without the ranks' clocks, see StepResult.
            outcomes.append([train_step(engine, rows, 1e-2) for _ in range(5)])
    assert outcomes[0] == outcomes[1]


def test_recomputation_draws_the_same_masks() -> None:
    results = []
    for granularity in ("none", "selective", "full"):
        base = config("triton", "bf16", **DROPOUT)
        parallel = dataclasses.replace(base.parallel, recompute_granularity=granularity)
        with runs.alone(dataclasses.replace(base, parallel=parallel)) as engine:
            results.append(losses_and_gradients(engine))
    for losses, gradients in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)
    assert np.isfinite(results[0][0].cpu().numpy()).all()
