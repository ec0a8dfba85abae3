"""What ranks tell one another: a mistake, said once; a stop; validation losses."""

import os
import signal

import numpy as np
import pytest
import runs
import torch.distributed as dist
from plans import MemoryLoader
from pool import Pool

from megatron_iml.config import Config, ParallelConfig
from megatron_iml.training.agree import on_every_rank
from megatron_iml.training.signals import StopRequest
from megatron_iml.training.step import train_step
from megatron_iml.training.validation import validation_losses


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


def fail_in_turn(cases: list[list[str | None]]) -> list[tuple[str, int | None]]:
    return [fail(messages) for messages in cases]


def test_a_mistake_is_said_once_and_by_all(pool: Pool) -> None:
    expected = {
        "": [None, None, None],
        "no plan": ["no plan"] * 3,
        "rank 2: no plan": [None, None, "no plan"],
        "rank 0: no plan\nrank 2: no corpus": ["no plan", None, "no corpus"],
        "FileNotFoundError('')": [""] * 3,
    }
    for rank, results in enumerate(pool.run(fail_in_turn, 3, list(expected.values()))):
        assert [text for text, _ in results] == list(expected)
        assert [result for _, result in results] == [rank, None, None, None, None]


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
