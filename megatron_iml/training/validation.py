"""Forward-only loss per level of generalisation, over small plans of held-out documents.

    {"fully_held_out": 3.1, "partially_supervised": 2.8, "fully_supervised": 2.2}

The mean is over targets, with the same sum-then-divide-once as training, so it does not depend on the layout.
"""

from collections.abc import Mapping

from megatron_iml.data.rows.loader import Loader

from .engine import Engine
from .reports import hear, tell
from .rows import step_rows
from .step import mean_loss


def validation_losses(engine: Engine, loaders: Mapping[str, Loader]) -> dict[str, float]:
    """Mean negative log-likelihood per target of every level, the same on every rank."""
    losses = {}
    for level, loader in loaders.items():
        # All rows as one step: pipelines fill once, and the loss is divided once.
        rows = step_rows(loader, range(loader.plan.num_rows), engine.config, engine.layout)
        # Weights that are still being gathered are waited for by the modules that use them, as in training.
        per_row = engine.run(rows.micro_batches(engine.layout), len(rows.rows), forward_only=True)
        # Also takes the forward times out of the timer, which the next step would report as its own.
        losses[level] = mean_loss(hear(tell(engine, per_row, rows), rows, engine.config))
    return losses
