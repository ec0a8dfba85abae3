"""The Triton kernels under layouts: the losses and weights of plain torch, on a CPU in Triton's interpreter.

What only a layout asks of an op shows here: a pipeline frees what it has sent, so a stage's output must own
its memory; under sequence parallelism an op sees a part of a row; a recomputed layer is run again.
"""

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import runs
import torch
from pool import Pool

from megatron_iml.config import Config, ParallelConfig
from megatron_iml.model import build
from megatron_iml.model.ops import TRITON

pytest.importorskip("triton", reason="triton is not installed")

INTERLEAVED = {"virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full"}
LAYOUTS = {
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "tp2-sp-selective": (
        2,
        ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, recompute_granularity="selective"
        ),
    ),
    "pp2-interleaved-full": (2, ParallelConfig(pipeline_model_parallel_size=2, **INTERLEAVED)),
}
SLOW = {"pp2-interleaved-full"}


def one_step(config: Config) -> runs.Outcome:
    """A job for the pool. On a CPU the trainer refuses these kernels, since the interpreter is for tests."""
    ops = mock.patch.object(build, "choose_ops", lambda *unused: TRITON)
    with nullcontext() if config.model.kernel_backend == "reference" or torch.cuda.is_available() else ops:
        engine = runs.fresh_engine(config)
        return runs.outcome(engine, runs.take_steps(engine, range(1)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_same_step_as_plain_torch_on_a_single_rank(pool: Pool, name: str) -> None:
    if not pool.on_gpus and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this machine has GPUs: Triton compiles for them, and not for the CPU ranks of gloo")
    ranks, parallel = LAYOUTS[name]
    # Interleaving wants two layers a stage; else two in all, since the interpreter takes seconds a layer.
    layers = 4 if parallel.virtual_pipeline_model_parallel_size else 2
    (expected,) = pool.run(one_step, 1, runs.run_config(num_layers=layers))
    config = runs.run_config(parallel=parallel, kernel_backend="triton", num_layers=layers)
    outcomes = pool.run(one_step, ranks, config)
    for rank in outcomes:
        # fp32 in another order of sums. A mask or a gradient that differs moves both by 1e-3 and more.
        assert abs(rank.steps[0].loss - expected.steps[0].loss) < 1e-5
        assert abs(rank.steps[0].grad_norm / expected.steps[0].grad_norm - 1) < 1e-4
    weights, wanted = runs.full_weights(outcomes), runs.full_weights([expected])
    for weight_name, weight in weights.items():
        # Adam's first step moves a weight by the learning rate, 1e-3, in the direction of its gradient.
        assert (weight - wanted[weight_name]).abs().max() < 1e-4, weight_name
