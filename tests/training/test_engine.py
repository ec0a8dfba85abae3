"""What a run of the schedule leaves behind."""

import runs
import torch


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
