"""Faults planted on one rank: the start-up test or the step's reports stop every rank and name the one.

Each job plants several faults in one world: a fault is found before anything is updated, and after a test of
start-up the same engine goes on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import runs
import torch.distributed as dist
from plans import MemoryLoader
from pool import Pool
from torch import Tensor

from megatron_iml.config import Config, ParallelConfig
from megatron_iml.kernels.document_attention import DocumentBounds, document_attention_reference
from megatron_iml.model import build
from megatron_iml.model.ops import REFERENCE
from megatron_iml.parallel.groups import start_distributed
from megatron_iml.training.copies import check_copies
from megatron_iml.training.engine import Engine
from megatron_iml.training.rows import step_rows
from megatron_iml.training.self_test import run_self_test
from megatron_iml.training.step import train_step

# Rank 1 is a middle stage and has layers 1 and 2.
PP3 = ParallelConfig(pipeline_model_parallel_size=3, pipeline_layers=(1, 2, 1))
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
# Ranks 0 and 1 are the tensor ranks of replica 0, ranks 2 and 3 those of replica 1.
TP2_DP2 = ParallelConfig(tensor_model_parallel_size=2)


def complaint(action: Callable[..., Any], *arguments: Any) -> str:
    """What the action, done on every rank, raises here."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        action(*arguments)
    return str(caught.value)


def one_too_far(qkv: Tensor, bounds: DocumentBounds, **settings: float) -> Tensor:
    end_T = (bounds.end_T + 1).clamp(max=len(bounds.end_T))
    return document_attention_reference(qkv, DocumentBounds.from_end(end_T), **settings)


def faults_of_a_middle_stage() -> dict[str, str]:
    rank = dist.get_rank()
    ops = dataclasses.replace(REFERENCE, document_attention=one_too_far)
    with mock.patch.object(build, "choose_ops", lambda *unused: ops if rank == 1 else REFERENCE):
        engine = runs.fresh_engine(runs.run_config(parallel=PP3))
    said = {"attention": complaint(run_self_test, engine)}
    for layer in engine.chunks[0].decoder.layers:
        layer.self_attention.ops = REFERENCE
    run_self_test(engine)

    last = engine.chunks[0].decoder.layers[-1]
    with mock.patch.object(last, "forward", last.forward if rank != 1 else skip):
        said["skipped layer"] = complaint(run_self_test, engine)

    rows = runs.deal(runs.rows_of_step(0, 96), engine.layout)
    said["order of rows"] = complaint(
        train_step, engine, rows if rank != 2 else dataclasses.replace(rows, rows=rows.rows[::-1]), 1e-3
    )
    if rank == 1:
        end_T = rows.rows[2].end_T.copy()
        end_T[0] += 1
        rows.rows[2] = dataclasses.replace(rows.rows[2], end_T=end_T)
    said["bound"] = complaint(train_step, engine, rows, 1e-3)
    return said


def skip(hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
    return hidden_states, None


def test_a_middle_stage_that_differs_is_named_by_all(pool: Pool) -> None:
    for said in pool.run(faults_of_a_middle_stage, 3):
        assert "\n  ranks [1]: the attention of layer 1 lets documents see one another\n" in said["attention"]
        # Losses are known on the last stage, gradients of embeddings on the first.
        assert "\n  rank 2: losses of documents" in said["attention"]
        assert "\n  rank 0: embedding gradients of documents" in said["attention"]
        lines = said["skipped layer"].splitlines()
        assert (
            lines[1]
            == "  rank 1: no gradient reached decoder.layers.2.input_layernorm.weight and 11 more weights"
        )
        assert len(lines) == 3
        assert said["bound"].startswith(
            "ranks [1] differ from ranks [0, 2]: they read other rows of the plan"
        )
        assert said["order of rows"].startswith("ranks [2] differ from ranks [0, 1]: they read other rows")


def fault_of_the_last_stage() -> str:
    ops = dataclasses.replace(REFERENCE, document_attention=one_too_far)
    is_last = dist.get_rank() == 1
    with mock.patch.object(build, "choose_ops", lambda *unused: ops if is_last else REFERENCE):
        engine = runs.fresh_engine(runs.run_config(parallel=PP2))
    return complaint(run_self_test, engine)


@pytest.mark.slow
def test_a_last_stage_that_differs_is_named_by_both(pool: Pool) -> None:
    """What two GPUs can run of the test above."""
    for said in pool.run(fault_of_the_last_stage, 2):
        assert "\n  ranks [1]: the attention of layer 2 lets documents see one another\n" in said


def faults_of_a_replica() -> dict[str, str]:
    rank = dist.get_rank()
    config = runs.run_config(parallel=TP2_DP2)
    engine = runs.fresh_engine(config)
    pieces = [runs.random_documents(np.random.default_rng(seed), 96, runs.ROW_LENGTH) for seed in range(6)]
    loader = MemoryLoader(pieces, runs.ROW_LENGTH)
    said = {"range": complaint(step_on, engine, loader, range(4) if rank < 2 else range(1, 5))}
    if rank >= 2:
        read = loader.row
        loader.row = lambda row: read(row + 1)  # type: ignore[method-assign]
    said["reader"] = complaint(step_on, engine, loader, range(4))

    check_copies(engine)
    runs.initialise(engine.chunks, config.model, 99 if rank == 1 else 1234, engine.layout)
    said["weights"] = complaint(run_self_test, engine)
    return said


def step_on(engine: Engine, loader: MemoryLoader, rows: range) -> None:
    train_step(engine, step_rows(loader, rows, engine.config, engine.layout), 1e-3)


def test_a_replica_or_rank_that_differs_is_named_by_all(pool: Pool) -> None:
    for said in pool.run(faults_of_a_replica, 4):
        assert said["range"].startswith("ranks [2, 3] differ from ranks [0, 1]: they take other documents")
        assert said["reader"].startswith("ranks [2, 3] read rows whose targets or bounds are not the plan's")
        assert said["weights"].startswith("weights: ranks [1] hold other bits than the copies on other ranks")


def join_with_another_seed(config: Config) -> str:
    if dist.get_rank() == 1:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=4321))
    return complaint(start_distributed, config)


def test_a_rank_started_with_another_seed_is_named_by_all(pool: Pool) -> None:
    for said in pool.run(join_with_another_seed, 3, runs.run_config()):
        assert said == (
            "training.seed: got 4321 on ranks [1] and 1234 on the others; allowed: one value "
            "everywhere; start every rank with the same file and overrides"
        )
