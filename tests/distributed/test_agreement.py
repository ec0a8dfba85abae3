"""What ranks tell one another: a mistake, said once; rows that differ; a stop; a leak."""

import dataclasses
import os
import signal
from unittest import mock

import numpy as np
import pytest
import runs
import torch
import torch.distributed as dist
from plans import MemoryLoader
from pool import Pool
from torch import Tensor

from megatron_iml.config import Config, ParallelConfig
from megatron_iml.kernels.document_attention import DocumentBounds, document_attention_reference
from megatron_iml.model import build
from megatron_iml.model.ops import REFERENCE
from megatron_iml.training.agree import on_every_rank
from megatron_iml.training.self_test import run_self_test
from megatron_iml.training.signals import StopRequest
from megatron_iml.training.step import train_step
from megatron_iml.training.validation import validation_losses

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def fail(messages: list[str | None]) -> tuple[str, int | None]:
    """Each rank raises its message, or returns its rank; gives back (what was raised, the result)."""
    message = messages[dist.get_rank()]

    def action() -> int:
        if message is not None:
            raise FileNotFoundError(message)
        return dist.get_rank()

    try:
        return "", on_every_rank(action)
    except ValueError as error:
        return str(error), None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([None, None, None], ""),
        (["no plan"] * 3, "no plan"),
        ([None, None, "no plan"], "rank 2: no plan"),
        (["no plan", None, "no corpus"], "rank 0: no plan\nrank 2: no corpus"),
    ],
)
def test_a_mistake_is_said_once_and_by_all(pool: Pool, messages: list[str | None], said: str) -> None:
    results = pool.run(fail, 3, messages)
    assert [text for text, _ in results] == [said] * 3
    assert [result for _, result in results] == ([0, 1, 2] if not said else [None] * 3)


def step_on_other_rows(odd_rank: int, change: str) -> str:
    engine = runs.fresh_engine(runs.run_config(parallel=TP2_PP2))
    rows = runs.deal(runs.rows_of_step(0, 96), engine.layout)
    if engine.layout.rank == odd_rank:
        row = rows.rows[2]
        if change == "bound":
            end = row.layout.end_T.copy()
            end[0] += 1
            row = dataclasses.replace(row, layout=dataclasses.replace(row.layout, end_T=end))
        changed = [*rows.rows[:2], row, rows.rows[3]] if change == "bound" else rows.rows[::-1]
        rows = dataclasses.replace(rows, rows=changed)
    with pytest.raises(RuntimeError) as caught:
        train_step(engine, rows, 1e-3)
    return str(caught.value)


@pytest.mark.parametrize(("odd_rank", "change"), [(2, "bound"), (1, "order")])
def test_a_rank_that_reads_other_rows_is_named_by_all(pool: Pool, odd_rank: int, change: str) -> None:
    for message in pool.run(step_on_other_rows, 4, odd_rank, change):
        others = [rank for rank in range(4) if rank != odd_rank]
        assert message.startswith(f"ranks [{odd_rank}] differ from ranks {others}: they read other rows")


def stop_on_rank_one() -> list[bool]:
    engine = runs.fresh_engine(runs.run_config(num_layers=1))
    stop = StopRequest()
    stopped = []
    for step in range(2):
        if step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        rows = runs.deal(runs.rows_of_step(step, 96), engine.layout)
        stopped.append(train_step(engine, rows, 1e-3, stop.received).stop)
    return stopped


def test_a_signal_to_one_rank_stops_all(pool: Pool) -> None:
    assert pool.run(stop_on_rank_one, 2) == [[False, True], [False, True]]


def self_test_with_a_leak(config: Config, leaky_rank: int) -> str:
    def no_bounds(qkv: Tensor, bounds: DocumentBounds, **settings: float) -> Tensor:
        end = torch.full_like(bounds.end_T, len(bounds.end_T))
        return document_attention_reference(qkv, DocumentBounds.from_end(end), **settings)

    leaky = dataclasses.replace(REFERENCE, document_attention=no_bounds)
    ops = leaky if dist.get_rank() == leaky_rank else REFERENCE
    with mock.patch.object(build, "choose_ops", lambda backend, device: ops):
        engine = runs.fresh_engine(config)
    with pytest.raises(RuntimeError) as caught:
        run_self_test(engine)
    return str(caught.value)


@pytest.mark.parametrize("leaky_rank", [0, 1])
def test_a_leak_on_one_stage_stops_every_rank(pool: Pool, leaky_rank: int) -> None:
    config = runs.run_config(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    messages = pool.run(self_test_with_a_leak, 2, config, leaky_rank)
    assert messages[0] == messages[1]
    # Losses are known on the last stage, gradients of embeddings on the first.
    assert "\n  rank 1: losses of documents" in messages[0]
    assert "\n  rank 0: embedding gradients of documents" in messages[0]


def validate(config: Config) -> dict[str, float]:
    engine = runs.fresh_engine(config)
    seeds = range(5)
    rows = [runs.random_documents(np.random.default_rng(seed), 96, runs.ROW_LENGTH) for seed in seeds]
    loaders = {
        "held_out": MemoryLoader(rows, runs.ROW_LENGTH),
        "one_row": MemoryLoader(rows[:1], runs.ROW_LENGTH),
    }
    return validation_losses(engine, loaders)


def test_validation_does_not_depend_on_the_layout(pool: Pool) -> None:
    """Five rows and one row: neither divides, so ranks and interleaved stages run empty ones too."""
    single = pool.run(validate, 1, runs.run_config())[0]
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    for ranks, parallel in ((2, ParallelConfig()), (2, interleaved)):
        for losses in pool.run(validate, ranks, runs.run_config(parallel=parallel)):
            assert losses == pytest.approx(single, abs=1e-6)
