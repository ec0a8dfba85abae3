"""Runs that distributed tests compare: a few steps of a tiny OPT, the same under every layout.

outcome = pool.run(train, ranks, config, steps)     # one Outcome per rank
full_weights(outcomes)                              # {global name: whole tensor}, replicas checked
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from helpers import tiny_config
from megatron.core.pipeline_parallel import p2p_communication, schedules
from torch import Tensor

from megatron_iml.checkpoint.record import RunState
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, ParallelConfig
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.model import build
from megatron_iml.model.initialise import initialise
from megatron_iml.model.parameters import named_global_parameters, tensor_parallel_dim
from megatron_iml.model.transformer_config import build_transformer_config
from megatron_iml.parallel.groups import Layout, start_distributed, stop_distributed
from megatron_iml.parallel.rows import deal_rows
from megatron_iml.training import optimizer
from megatron_iml.training.engine import Engine, build_engine
from megatron_iml.training.rows import StepRows
from megatron_iml.training.self_test import run_self_test
from megatron_iml.training.step import StepResult, train_step

ROW_LENGTH = 64
ROWS_PER_STEP = 4
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Weight:
    """A rank's part of one parameter."""

    part: Tensor
    dim: int | None
    """The dimension tensor parallelism cuts, if it does."""


@dataclass(frozen=True)
class Outcome:
    """What a run left on one rank."""

    layout: tuple[int, int, int]
    """Tensor, pipeline and data rank."""
    steps: list[StepResult]
    weights: list[tuple[str, Weight]]


def run_config(precision: str = "fp32", parallel: ParallelConfig | None = None, **model: object) -> Config:
    """Four layers, every dropout on, weight decay and clipping on."""
    dropouts = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
    config = tiny_config(precision, parallel, **({"num_layers": 4} | dropouts | model))
    adam = OptimizerConfig(weight_decay=0.1, clip_grad=1.0, warmup_steps=0)
    return dataclasses.replace(config, data=DataConfig(row_length=ROW_LENGTH), optimizer=adam)


def random_documents(rng: np.random.Generator, vocab_size: int, slots: int) -> list[Piece]:
    """Plain documents of 2 to 20 tokens, then a trunk with a branch, in at most so many slots."""
    pieces: list[Piece] = []
    while slots > 40:
        length = int(rng.integers(2, 21))
        tokens = rng.integers(4, vocab_size, length).astype(np.int32)
        pieces.append(Piece(tokens, int(rng.integers(0, length))))
        slots -= length - 1
    trunk = rng.integers(4, vocab_size, 12).astype(np.int32)
    branch = np.concatenate([trunk[:7], rng.integers(4, vocab_size, 9)]).astype(np.int32)
    pieces.append(Piece(trunk, 5))
    pieces.append(Piece(branch, 8, trunk=len(pieces) - 1, shared=7))
    return pieces


def rows_of_step(step: int, vocab_size: int) -> list[Row]:
    """All rows of one step; their indices in the plan, which the dropout masks depend on, never repeat."""
    indices = range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP)
    return [
        assemble_row(random_documents(np.random.default_rng(i), vocab_size, ROW_LENGTH), ROW_LENGTH, i)
        for i in indices
    ]


def deal(rows: Sequence[Row], layout: Layout) -> StepRows:
    """This rank's rows of a step; a middle stage gets layouts without tokens, as in training."""
    own = deal_rows([float(row.layout.num_targets) for row in rows], layout.data_size)[layout.data_rank]
    edge = layout.is_first_stage or layout.is_last_stage
    return StepRows(
        rows=[rows[i] if edge else rows[i].layout for i in own],
        num_rows=len(rows),
        num_targets=sum(row.layout.num_targets for row in rows),
        num_real=sum(row.layout.num_real for row in rows),
        num_documents=0,
        useful_flops=0.0,
        documents_crc=0,
    )


def fresh_engine(config: Config) -> Engine:
    """An engine with random weights, the same whatever the layout."""
    layout = start_distributed(config)
    # megatron-core's smallest bucket is larger than this whole model: overlap would have nothing to overlap.
    small_buckets = partial(optimizer.DistributedDataParallelConfig, bucket_size=20_000)
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", small_buckets):
        engine = build_engine(config, layout)
    initialise(engine.chunks, config.model, config.training.seed, layout)
    engine.optimizer.reload_model_params()
    return engine


def state_at(step: int) -> RunState:
    """After so many steps of these rows."""
    return RunState(step, ROWS_PER_STEP * step, "plan", "corpus")


def save(engine: Engine, folder: Path, step: int) -> Path:
    """A checkpoint that is there when this returns."""
    CheckpointStore(folder, CheckpointConfig(asynchronous=False)).save(engine, state_at(step), {})
    return folder / f"iter_{step:07d}"


def weights_of(engine: Engine) -> list[Tensor]:
    """Copies of this rank's parameters."""
    return [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]


def same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same values."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@contextmanager
def alone(config: Config) -> Iterator[Engine]:
    """A fresh engine in this process, a world of one."""
    try:
        yield fresh_engine(config)
    finally:
        stop_distributed()


def take_steps(
    engine: Engine,
    steps: range,
    num_rows: int = ROWS_PER_STEP,
    before_update: Callable[[], None] | None = None,
) -> list[StepResult]:
    """Train on the rows of these steps."""
    results = []
    for step in steps:
        rows = deal(rows_of_step(step, engine.config.model.vocab_size)[:num_rows], engine.layout)
        results.append(train_step(engine, rows, LEARNING_RATE, before_update=before_update))
    return results


def outcome(engine: Engine, steps: list[StepResult]) -> Outcome:
    """What this rank holds now."""
    engine.gather_weights()
    layout = engine.layout
    weights = [
        (name, Weight(parameter.detach().to("cpu", copy=True), tensor_parallel_dim(parameter)))
        for name, parameter in named_global_parameters(engine.chunks)
    ]
    return Outcome((layout.tensor_rank, layout.pipeline_rank, layout.data_rank), steps, weights)


def decay_everything(engine: Engine) -> Engine:
    """Let biases and norms decay too, which training spares.

    Among the numbers of such a run no ReLU's input is so near zero that layouts, which round otherwise, would
    take different sides of it. One in 262,144 (2.6e-8) is enough to set gradient norms 4e-4 apart, as seen in
    the second step when only matrices decay.
    """
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = engine.config.optimizer.weight_decay
    return engine


def train(config: Config, steps: int) -> Outcome:
    """A job for the pool: so many steps from random weights, after the self-test."""
    engine = decay_everything(fresh_engine(config))
    run_self_test(engine)
    return outcome(engine, take_steps(engine, range(steps)))


def one_gradient(config: Config) -> Outcome:
    """A job for the pool: the gradients of one step in place of weights, as Adam leaves them: divided and
    clipped; without data parallelism."""
    engine = fresh_engine(config)
    steps = [train_step(engine, deal(rows_of_step(0, config.model.vocab_size), engine.layout), 0.0)]
    layout = engine.layout
    assert layout.data_size == 1, "replicas leave each rank a slice of the sum"
    gradients = [
        (name, Weight(parameter.main_grad.to("cpu", copy=True), tensor_parallel_dim(parameter)))
        for name, parameter in named_global_parameters(engine.chunks)
    ]
    return Outcome((layout.tensor_rank, layout.pipeline_rank, layout.data_rank), steps, gradients)


@contextmanager
def poisoned_gifts(late: bool) -> Iterator[None]:
    """Memory of sent outputs holds NaN from the moment it is given back, and this rank receives late.

    A message that is still to be read then is caught every time: left to chance, the memory often keeps its
    old values until a fast receiver has them.
    """
    give_back, exchange = schedules.deallocate_output_tensor, p2p_communication._p2p_ops

    def poison_and_give_back(out: Any, deallocate_pipeline_outputs: bool = False) -> None:
        if isinstance(out, Tensor) and deallocate_pipeline_outputs:
            out.data.fill_(torch.nan)
        give_back(out, deallocate_pipeline_outputs)

    def exchange_late(**messages: Any) -> Any:
        if late:
            time.sleep(0.1)
        return exchange(**messages)

    with (
        mock.patch.object(schedules, "deallocate_output_tensor", poison_and_give_back),
        mock.patch.object(p2p_communication, "_p2p_ops", exchange_late),
    ):
        yield


def train_unlike(config: Config, steps: int, engine_fields: dict[str, Any]) -> Outcome:
    """The same without the self-test, with fields of megatron-core's configuration set otherwise."""

    def otherwise(config: Config, device: torch.device) -> Any:
        built = build_transformer_config(config, device)
        # Past its own checks, which say nothing of the traps that this is for.
        vars(built).update(engine_fields)
        return built

    with mock.patch.object(build, "build_transformer_config", otherwise):
        engine = decay_everything(fresh_engine(config))
    last_stage = config.parallel.pipeline_model_parallel_size - 1
    with poisoned_gifts(late=engine.layout.pipeline_rank == last_stage):
        return outcome(engine, take_steps(engine, range(steps)))


def full_weights(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """Whole tensors by global name. Asserts that every copy of a part is the same bits."""
    parts: dict[str, dict[int, Tensor]] = {}
    dims: dict[str, int | None] = {}
    for rank in outcomes:
        for name, weight in rank.weights:
            place = 0 if weight.dim is None else rank.layout[0]
            known = parts.setdefault(name, {}).setdefault(place, weight.part)
            assert torch.equal(known, weight.part), f"copies of {name} differ at {rank.layout}"
            dims[name] = weight.dim
    return {
        name: pieces[0] if dims[name] is None else torch.cat([pieces[i] for i in sorted(pieces)], dims[name])
        for name, pieces in parts.items()
    }
