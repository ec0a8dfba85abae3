"""One run, every layout: the same losses, gradient norms and final weights as a single rank, with dropout on.

Each layout first passes the self-test of isolation, which must leave no trace in what follows.

Tolerances. Layouts differ in the order of fp32 sums only, one rounding (6e-8, relative) a sum. Seen over 10
steps: losses 6e-8 apart, gradient norms 3e-7 (relative), weights 1.2e-6, where a weight moves up to 1e-2. A
mask, a count or a gradient that differs moves them by 1e-3 and more (see the last test). So: 1e-6, 2e-6 and
1e-5.
"""

import dataclasses

import pytest
import runs
import torch
from pool import Pool

from megatron_iml.config import ParallelConfig

STEPS = 10


def layout(tensor: int = 1, pipeline: int = 1, **others: object) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, **others)


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "dp2": (2, layout()),
    "tp2": (2, layout(tensor=2)),
    "tp2-sp": (2, layout(tensor=2, sequence_parallel=True)),
    "pp2": (2, layout(pipeline=2)),
    "pp2-interleaved": (2, layout(pipeline=2, virtual_pipeline_model_parallel_size=2)),
    "tp2-pp2": (4, layout(tensor=2, pipeline=2, sequence_parallel=True)),
    "tp2-dp2": (4, layout(tensor=2)),
    "pp2-dp2": (4, layout(pipeline=2)),
    "dp2-overlap": (2, layout(**OVERLAP)),
    "tp2-sp-selective": (2, layout(tensor=2, sequence_parallel=True, recompute_granularity="selective")),
    "tp2-sp-full": (2, layout(tensor=2, sequence_parallel=True, recompute_granularity="full")),
}
SLOW_LAYOUTS = {
    "pp4": (4, layout(pipeline=4)),
    "tp4-sp": (4, layout(tensor=4, sequence_parallel=True)),
    "pp2-interleaved-dp2-overlap": (
        4,
        layout(pipeline=2, virtual_pipeline_model_parallel_size=2, **OVERLAP),
    ),
    "dp2-reduce-overlap": (2, layout(overlap_grad_reduce=True)),
    "pp2-dp2-overlap": (4, layout(pipeline=2, **OVERLAP)),
    "tp2-pp2-dp2": (8, layout(tensor=2, pipeline=2, sequence_parallel=True, recompute_granularity="full")),
}


@pytest.fixture(scope="module")
def single(pool: Pool) -> runs.Outcome:
    """The canonical run: one rank, nothing sharded, nothing recomputed."""
    return pool.run(runs.train, 1, runs.run_config(), STEPS)[0]


def assert_same_run(outcomes: list[runs.Outcome], single: runs.Outcome) -> None:
    for rank in outcomes:
        assert [step.num_targets for step in rank.steps] == [step.num_targets for step in single.steps]
        for number, (ours, theirs) in enumerate(zip(rank.steps, single.steps, strict=True)):
            assert abs(ours.loss - theirs.loss) < 1e-6, f"loss of step {number} at {rank.layout}"
            norm_error = abs(ours.grad_norm - theirs.grad_norm) / theirs.grad_norm
            assert norm_error < 2e-6, f"gradient norm of step {number} at {rank.layout}: {norm_error:.1e}"
    weights, expected = runs.full_weights(outcomes), runs.full_weights([single])
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        error = (weight - expected[name]).abs().max()
        assert error < 1e-5, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_run_as_a_single_rank(pool: Pool, single: runs.Outcome, name: str) -> None:
    ranks, parallel = LAYOUTS[name]
    assert_same_run(pool.run(runs.train, ranks, runs.run_config(parallel=parallel), STEPS), single)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_LAYOUTS)
def test_same_run_as_a_single_rank_on_more_layouts(pool: Pool, single: runs.Outcome, name: str) -> None:
    ranks, parallel = SLOW_LAYOUTS[name]
    outcomes = pool.run(runs.train, ranks, runs.run_config(parallel=parallel), STEPS, timeout_seconds=400.0)
    assert_same_run(outcomes, single)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_no_bit(pool: Pool, single: runs.Outcome, granularity: str) -> None:
    config = runs.run_config(parallel=layout(recompute_granularity=granularity))
    recomputed = pool.run(runs.train, 1, config, STEPS)[0]
    assert recomputed.steps == single.steps
    for (name, ours), (_, theirs) in zip(recomputed.weights, single.weights, strict=True):
        assert torch.equal(ours.part, theirs.part), name


def test_another_seed_is_another_run(pool: Pool, single: runs.Outcome) -> None:
    """What the tolerances above must tell apart: the same weights and data under other dropout masks."""
    config = runs.run_config()
    reseeded = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=4321))
    steps = pool.run(train_with_weights_of, 1, reseeded, config.training.seed)[0]
    assert abs(steps[0].loss - single.steps[0].loss) > 1e-3
    assert abs(steps[0].grad_norm - single.steps[0].grad_norm) > 1e-2


def train_with_weights_of(config: runs.Config, seed: int) -> list[runs.StepResult]:
    engine = runs.fresh_engine(config)
    runs.initialise(engine.chunks, config.model, seed, engine.layout)
    engine.optimizer.reload_model_params()
    return runs.take_steps(engine, range(1))
