"""What a run of the schedule leaves behind."""

import runs
import torch

from megatron_iml.data.rows.assemble import Row


def test_only_a_run_with_a_backward_builds_a_graph() -> None:
    config = runs.run_config()
    rows = runs.rows_of_step(0, config.model.vocab_size)
    with runs.alone(config) as engine:
        builds_graph: list[bool] = []
        layer = engine.chunks[0].decoder.layers[0]
        layer.register_forward_hook(lambda _, inputs, outputs: builds_graph.append(outputs[0].requires_grad))
        for forward_only in (True, False):
            batches = runs.deal(rows, engine.layout).micro_batches(engine.layout)
            engine.run(batches, len(rows), forward_only)
        assert builds_graph == [False] * len(rows) + [True] * len(rows)
        assert torch.is_grad_enabled()


def gradient_of(rows: list[Row], sums: bool) -> torch.Tensor:
    """The whole gradient of these rows as the schedule leaves it, fp32 [parameters]."""
    config = runs.run_config()
    with runs.alone(config) as engine:
        engine.chunks[0].config.calculate_per_token_loss = sums
        engine.zero_gradients()
        batches = runs.deal(rows, engine.layout).micro_batches(engine.layout)
        engine.run(batches, len(rows), forward_only=False)
        return torch.cat([p.main_grad.flatten().clone() for p in engine.chunks[0].parameters()])


def test_without_sums_rows_weigh_the_same_whatever_their_targets() -> None:
    """megatron-core's other way, an average of averages, is another gradient when rows differ in targets."""
    rows = runs.rows_of_step(0, 96)[:2]
    one, other = (row.layout.num_targets for row in rows)
    assert one != other
    # A row alone: the average is the sum divided.
    torch.testing.assert_close(gradient_of(rows[:1], False) * one, gradient_of(rows[:1], True))
    mean, averages = gradient_of(rows, True) / (one + other), gradient_of(rows, False)
    assert (mean - averages).norm() > 0.01 * mean.norm()
