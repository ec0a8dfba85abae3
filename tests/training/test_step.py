"""One step: what it must not depend on, what it refuses, and fp16's overflow."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import Tensor

from megatron_iml.config import Config
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.model.parameters import named_global_parameters
from megatron_iml.training.engine import Engine
from megatron_iml.training.optimizer import scale_gradients
from megatron_iml.training.rows import StepRows
from megatron_iml.training.step import StepResult, train_step


def step_rows(rows: list[Row]) -> StepRows:
    targets = sum(row.layout.num_targets for row in rows)
    return StepRows(list(rows), len(rows), targets, 0, 0, 0.0, 0)


def one_step(config: Config, rows: list[Row]) -> tuple[StepResult, dict[str, Tensor]]:
    """The step's result and its gradients as the update leaves them: reduced, divided, clipped."""
    with runs.alone(config) as engine:
        result = train_step(engine, step_rows(rows), learning_rate=0.0)
        parameters = named_global_parameters(engine.chunks)
        return result, {name: parameter.main_grad.clone() for name, parameter in parameters}


def assert_same(
    ours: tuple[StepResult, dict[str, Tensor]], theirs: tuple[StepResult, dict[str, Tensor]]
) -> None:
    assert ours[0].num_targets == theirs[0].num_targets
    assert abs(ours[0].loss - theirs[0].loss) < 1e-6
    assert abs(ours[0].grad_norm / theirs[0].grad_norm - 1) < 2e-6
    for name, gradient in ours[1].items():
        error = (gradient - theirs[1][name]).abs().max()
        # Rounding of sums in another order: seen 4e-7 of the largest gradient.
        assert error < 1e-5 * theirs[1][name].abs().max() + 1e-9, f"{name}: {error:.1e}"


def random_pieces(lengths: list[int]) -> list[Piece]:
    rng = np.random.default_rng(7)
    return [Piece(rng.integers(4, 96, length).astype(np.int32), length // 2) for length in lengths]


def test_order_of_rows_does_not_matter_with_dropout_on() -> None:
    rows = runs.rows_of_step(0, 96)
    assert_same(one_step(runs.run_config(), rows[::-1]), one_step(runs.run_config(), rows))


def test_split_into_micro_batches_does_not_matter() -> None:
    """The same documents in one row, in two uneven rows, and in a row each."""
    config = runs.run_config(hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    pieces = random_pieces([20, 3, 9, 2, 14])
    one = one_step(config, [assemble_row(pieces, 64, 0)])
    two = one_step(config, [assemble_row(pieces[:4], 64, 0), assemble_row(pieces[4:], 64, 1)])
    five = one_step(config, [assemble_row([piece], 64, index) for index, piece in enumerate(pieces)])
    assert_same(two, one)
    assert_same(five, one)


def test_loss_is_the_mean_over_targets() -> None:
    config = runs.run_config(hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    rows = runs.rows_of_step(0, 96)
    with runs.alone(config) as engine:
        losses = engine.run([iter(runs.deal(rows, engine.layout).micro_batches(engine.layout)[0])], 4, True)
        per_target = torch.cat(losses)
        result = train_step(engine, step_rows(rows), 0.0)
    assert result.num_targets == per_target.numel()
    assert abs(result.loss - per_target.double().mean()) < 1e-6
    # Nearly uniform over the vocabulary at random weights.
    assert abs(result.loss - math.log(96)) < 0.3


def test_a_count_that_is_not_the_plans_stops_the_run() -> None:
    rows = runs.rows_of_step(0, 96)
    with runs.alone(runs.run_config()) as engine:
        wrong = dataclasses.replace(step_rows(rows), num_targets=1000)
        weights = [parameter.clone() for chunk in engine.chunks for parameter in chunk.parameters()]
        with pytest.raises(
            RuntimeError, match="the model saw 123 targets in this step but the plan holds 1000"
        ):
            train_step(engine, wrong, 1.0)
        after = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True)), "it had already updated"


def test_a_run_that_has_diverged_stops() -> None:
    with runs.alone(runs.run_config()) as engine:
        engine.chunks[0].decoder.final_layernorm.weight.data.fill_(float("nan"))
        before, steps = clones(engine), [group["step"] for group in adam_groups(engine)]
        with pytest.raises(FloatingPointError, match="the run has diverged"):
            train_step(engine, step_rows(runs.rows_of_step(0, 96)), 1e-3)
        after = clones(engine)
        assert all(torch.equal(before[name], after[name]) for name in before if "final_layernorm" not in name)
        assert [group["step"] for group in adam_groups(engine)] == steps


def adam_groups(engine: Engine) -> list[dict[str, Any]]:
    """Parameter groups of the one optimizer."""
    (distributed,) = engine.optimizer.chained_optimizers
    return distributed.optimizer.param_groups


def test_whoever_reads_the_weights_is_asked_before_they_change() -> None:
    with runs.alone(runs.run_config()) as engine:
        before, asked = clones(engine), []
        rows = step_rows(runs.rows_of_step(0, 96))
        train_step(engine, rows, 1e-3, before_update=lambda: asked.append(clones(engine)))
        assert len(asked) == 1
        assert all(torch.equal(before[name], asked[0][name]) for name in before)
        assert any(not torch.equal(before[name], value) for name, value in clones(engine).items())


def test_the_gradient_is_that_of_the_mean() -> None:
    """Twice the same rows: twice the sums, the same mean."""
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    config = runs.run_config(**no_dropout)
    # Far above the norm, so that no clipping hides a size.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_grad=1e6))
    rows = runs.rows_of_step(0, 96)
    once, twice = one_step(config, rows), one_step(config, [*rows, *rows])
    assert twice[0].num_targets == 2 * once[0].num_targets
    assert_same((dataclasses.replace(twice[0], num_targets=once[0].num_targets), twice[1]), once)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_a_target_changes_no_weight(precision: str) -> None:
    config = runs.run_config(precision)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.0))
    padding = assemble_row([], runs.ROW_LENGTH, 0)
    with runs.alone(config) as engine:
        before = clones(engine)
        result = train_step(engine, step_rows([padding]), 1e-3)
        assert (result.loss, result.grad_norm, result.num_targets, result.skipped) == (0.0, 0.0, 0, False)
        assert all(torch.equal(before[name], weight) for name, weight in clones(engine).items())
        assert train_step(engine, step_rows(runs.rows_of_step(0, 96)), 1e-3).grad_norm > 0.0


@pytest.mark.parametrize(
    ("norm", "most", "factor"), [(2.0, 1.0, 0.49999975), (0.5, 1.0, 1.0), (9.0, 0.0, 1.0)]
)
def test_clipping_scales_a_gradient_that_is_too_long(norm: float, most: float, factor: float) -> None:
    with runs.alone(runs.run_config()) as engine:
        (distributed,) = engine.optimizer.chained_optimizers
        for num_targets in (1, 7):
            scale_gradients(engine.optimizer, num_targets, norm, most)
            assert distributed.optimizer.gradient_factor == pytest.approx(factor / num_targets, rel=1e-9)


def test_a_clipped_step_is_that_of_the_clipped_gradient() -> None:
    # eps as large as a gradient, or Adam's first step is the same at any length.
    config = runs.run_config()
    optimizer = dataclasses.replace(config.optimizer, adam_eps=0.1, clip_grad=1e-2, weight_decay=0.0)
    config = dataclasses.replace(config, optimizer=optimizer)
    with runs.alone(config) as engine:
        before = clones(engine)
        result = train_step(engine, step_rows(runs.rows_of_step(0, 96)), 1e-2)
        assert result.grad_norm > 0.1
        for name, parameter in named_global_parameters(engine.chunks):
            # The update leaves the gradient clipped. Its first step is lr * g / (|g| + eps).
            gradient = parameter.main_grad
            expected = before[name] - 1e-2 * gradient / (gradient.abs() + 0.1)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
        squares = sum(
            float(p.main_grad.double().pow(2).sum()) for _, p in named_global_parameters(engine.chunks)
        )
        assert math.sqrt(squares) == pytest.approx(1e-2, rel=1e-3)


def test_learning_rate_and_clipping_reach_the_update() -> None:
    config = runs.run_config()
    weights = {}
    for rate in (0.0, 1e-3):
        with runs.alone(config) as engine:
            before = dict(clones(engine))
            train_step(engine, step_rows(runs.rows_of_step(0, 96)), rate)
            weights[rate] = {name: (w - before[name]).abs().max() for name, w in clones(engine).items()}
    assert all(change == 0 for change in weights[0.0].values())
    # Adam's first step is the learning rate itself wherever the gradient is well above eps.
    assert abs(weights[1e-3]["decoder.layers.0.mlp.linear_fc1.weight"] - 1e-3) < 5e-5


def test_weight_decay_spares_biases_and_norms() -> None:
    """From the same gradients: what has one axis moves as without decay, what has two is drawn to zero."""
    weights = {}
    for decay in (0.0, 0.5):
        config = runs.run_config()
        optimizer = dataclasses.replace(config.optimizer, weight_decay=decay)
        with runs.alone(dataclasses.replace(config, optimizer=optimizer)) as engine:
            before = clones(engine)
            train_step(engine, step_rows(runs.rows_of_step(0, 96)), 1e-2)
            weights[decay] = clones(engine)
    for name, weight in weights[0.0].items():
        decayed = 0.5 * 1e-2 * before[name] if weight.dim() > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(weight - weights[0.5][name], decayed, rtol=0, atol=1e-7)
    assert weights[0.0]["decoder.layers.0.input_layernorm.weight"].dim() == 1


def clones(engine: Engine) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named_global_parameters(engine.chunks)}


def test_fp16_overflow_skips_the_step_and_halves_the_scale() -> None:
    config = runs.run_config("fp16", num_layers=2)
    first_scale = 2.0**20
    scaler = dataclasses.replace(config.optimizer, initial_loss_scale=first_scale, loss_scale_window=2)
    config = dataclasses.replace(config, optimizer=scaler)
    rows = step_rows(runs.rows_of_step(0, 96)[:1])
    with runs.alone(config) as engine:
        before = clones(engine)
        overflows = 0
        while (result := train_step(engine, rows, 1e-3)).skipped:
            overflows += 1
            assert result.loss_scale == first_scale / 2**overflows
            assert math.isfinite(result.loss), "the gradient overflowed, the loss itself did not"
            assert all(torch.equal(weight, before[name]) for name, weight in clones(engine).items())
        assert overflows > 0
        assert any(not torch.equal(weight, before[name]) for name, weight in clones(engine).items())
        # Two clean steps, and it dares twice as much.
        assert result.loss_scale == first_scale / 2**overflows
        assert train_step(engine, rows, 1e-3).loss_scale == first_scale / 2 ** (overflows - 1)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_lower_precisions_follow_fp32(precision: str, tolerance: float) -> None:
    """Three steps; the types round to 2^-9 and 2^-12, and losses average a hundred targets."""
    losses = {}
    for name in ("fp32", precision):
        with runs.alone(runs.run_config(name)) as engine:
            losses[name] = [result.loss for result in runs.take_steps(engine, range(3))]
    assert max(abs(a - b) for a, b in zip(losses["fp32"], losses[precision], strict=True)) < tolerance
    assert losses[precision] != losses["fp32"]
