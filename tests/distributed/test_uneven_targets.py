"""Ranks with more and fewer targets, and none at all: every target weighs the same, wherever its row runs."""

import numpy as np
import pytest
import runs
from pool import Pool

from megatron_iml.config import ParallelConfig
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.training.rows import StepRows, empty_row
from megatron_iml.training.step import train_step


def row_with_targets(index: int, targets: int) -> Row:
    tokens = np.random.default_rng(index).integers(4, 96, 30).astype(np.int32)
    return assemble_row([Piece(tokens, 30 - targets)], runs.ROW_LENGTH, index)


def rows_by_hand() -> list[Row]:
    """29 and 25 targets for the first rank of two, 1 and none for the second."""
    return [
        row_with_targets(0, 29),
        row_with_targets(1, 25),
        row_with_targets(2, 1),
        empty_row(runs.ROW_LENGTH),
    ]


def train_on_halves(config: runs.Config, order: list[int]) -> runs.Outcome:
    """Two steps on the rows in this order; each data rank takes its contiguous part."""
    engine = runs.fresh_engine(config)
    rows = rows_by_hand()
    per_rank = len(rows) // engine.layout.data_size
    own = order[engine.layout.data_rank * per_rank :][:per_rank]
    step_rows = StepRows([rows[i] for i in own], 4, 55, 0, 0, 0.0, 0)
    return runs.outcome(engine, [train_step(engine, step_rows, runs.LEARNING_RATE) for _ in range(2)])


PIPELINE = ParallelConfig(pipeline_model_parallel_size=2)
# Reduction waits for every parameter's gradient, recomputation for every output's: also those of padding.
OVERLAP = ParallelConfig(overlap_grad_reduce=True, recompute_granularity="selective")


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(4, PIPELINE), (2, OVERLAP)],
    ids=["pp2-dp2", "dp2-overlap"],
)
def test_every_target_weighs_the_same(pool: Pool, ranks: int, parallel: ParallelConfig) -> None:
    single = pool.run(train_on_halves, 1, runs.run_config(), [0, 1, 2, 3])[0]
    assert [step.num_targets for step in single.steps] == [55, 55]
    expected = runs.full_weights([single])
    # As dealt by hand, then with the ranks' work mixed: neither may matter.
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        outcomes = pool.run(train_on_halves, ranks, runs.run_config(parallel=parallel), order)
        for rank in outcomes:
            for ours, theirs in zip(rank.steps, single.steps, strict=True):
                assert ours.num_targets == theirs.num_targets
                assert abs(ours.loss - theirs.loss) < 1e-6
                assert abs(ours.grad_norm / theirs.grad_norm - 1) < 2e-6
        for name, weight in runs.full_weights(outcomes).items():
            assert (weight - expected[name]).abs().max() < 1e-5, name
