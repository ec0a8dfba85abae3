"""Checkpoints between layouts: saved under one, loaded under another, saved again, the same bits.

A state is compared as whole tensors read straight from the files: weights, fp32 master weights, both Adam
moments. Reading back with the code that wrote could hide a mistake in it, so the first state is also compared
with that of a single rank, which shards nothing (to rounding: see test_layouts.py for how far layouts may
differ).
"""

from pathlib import Path

import pytest
import runs
import torch
from megatron.core import dist_checkpointing
from pool import Pool
from torch import Tensor

from megatron_iml.checkpoint.conversion.parameter_map import TABLE
from megatron_iml.checkpoint.load import load_run
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config, ParallelConfig
from megatron_iml.model.initialise import initialise

SAVED, LAST = range(3), range(3, 6)
SINGLE = ParallelConfig()
TP2_PP2 = ParallelConfig(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    sequence_parallel=True,
    pipeline_layers=(3, 1),
)
DP2_OVERLAP = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2_DP2 = ParallelConfig(pipeline_model_parallel_size=2)
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


def save_and_go_on(config: Config, folder: Path) -> runs.Outcome:
    """Three steps, a save in the background, three more steps while it is written."""
    engine = runs.fresh_engine(config)
    runs.take_steps(engine, SAVED)
    store = CheckpointStore(folder, CheckpointConfig())
    store.save(engine, runs.state_at(3), {})
    steps = runs.take_steps(engine, LAST)
    store.wait()
    return runs.outcome(engine, steps)


def load_and_go_on(config: Config, folder: Path, again: Path) -> runs.Outcome:
    """Load over other weights, save what was loaded, take the last three steps."""
    engine = runs.fresh_engine(config)
    # Whatever the load leaves untouched would be wrong, not right by chance.
    initialise(engine.chunks, config.model, 99, engine.layout)
    engine.optimizer.reload_model_params()
    runs.take_steps(engine, range(7, 8))
    assert load_run(folder / "iter_0000003", engine) == runs.state_at(3)
    runs.save(engine, again, 3)
    return runs.outcome(engine, runs.take_steps(engine, LAST))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole; a job, because the reader wants a world."""
    tensors = dist_checkpointing.load_plain_tensors(str(folder / "iter_0000003"))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, first {different[0]}"


def assert_same_steps(ours: runs.Outcome, theirs: runs.Outcome) -> None:
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert abs(mine.loss - other.loss) < 1e-6
        assert abs(mine.grad_norm / other.grad_norm - 1) < 2e-6


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_state_survives_a_chain_of_layouts(pool: Pool, tmp_path: Path, precision: str) -> None:
    first = tmp_path / "0"
    config = runs.run_config(precision, TP2_PP2)
    unbroken = pool.run(save_and_go_on, 4, config, first)
    state = pool.run(read_tensors, 1, first)[0]
    # Each as weight, master weight and two moments; the layers of one kind are one tensor.
    assert len(state) == 4 * len(TABLE)
    chain = {
        "single": (1, SINGLE),
        "interleaved": (2, INTERLEAVED),
        "overlap": (2, DP2_OVERLAP),
        "tp2": (2, TP2),
    }
    folder = first
    for name, (ranks, parallel) in chain.items():
        resharded = pool.run(
            load_and_go_on, ranks, runs.run_config(precision, parallel), folder, tmp_path / name
        )
        folder = tmp_path / name
        assert_bit_equal(pool.run(read_tensors, 1, folder)[0], state)
        if precision == "fp32":
            assert_same_steps(resharded[-1], unbroken[-1])
    resumed = pool.run(load_and_go_on, 4, config, folder, tmp_path / "back")
    assert_bit_equal(pool.run(read_tensors, 1, tmp_path / "back")[0], state)
    # The layout that saved takes the very steps it would have taken.
    assert resumed[-1].steps == unbroken[-1].steps
    for name, weight in runs.full_weights(resumed).items():
        assert torch.equal(weight, runs.full_weights(unbroken)[name]), name


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(4, TP2_PP2), (2, DP2_OVERLAP), (2, INTERLEAVED), pytest.param(4, PP2_DP2, marks=pytest.mark.slow)],
    ids=["tp2-pp2", "dp2-overlap", "interleaved", "pp2-dp2"],
)
def test_saved_state_is_the_single_ranks(
    pool: Pool, single_state: dict[str, Tensor], tmp_path: Path, ranks: int, parallel: ParallelConfig
) -> None:
    pool.run(save_three_steps, ranks, runs.run_config(parallel=parallel), tmp_path)
    state = pool.run(read_tensors, 1, tmp_path)[0]
    assert state.keys() == single_state.keys()
    for name, tensor in state.items():
        largest = single_state[name].abs().max()
        error = (tensor - single_state[name]).abs().max()
        # A key's bias cannot change a softmax: its gradient is rounding noise, so the floor is absolute.
        assert error < 2e-5 * largest + 1e-7, f"{name}: {error:.1e} of {largest:.1e}"


@pytest.fixture(scope="module")
def single_state(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("single")
    pool.run(save_three_steps, 1, runs.run_config(), folder)
    return pool.run(read_tensors, 1, folder)[0]


def save_three_steps(config: Config, folder: Path) -> None:
    engine = runs.fresh_engine(config)
    runs.take_steps(engine, SAVED)
    runs.save(engine, folder, 3)
