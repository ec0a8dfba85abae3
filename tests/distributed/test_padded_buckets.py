"""Two faults of megatron-core 0.16.1 in reshardable checkpoints, and that our remedies are what removes them.

The plain DistributedOptimizer saves each parameter behind a padded gradient bucket shifted. Buckets are
padded to a multiple of what the data ranks share: with three of them always, with two of them where
overlapped reduction cuts the buffer, and under a pipeline where the tied embedding has a bucket of its own.
torch's own AdamW saves, but no load follows. When a test finds that the fault is gone, the remedy can go too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import runs
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from pool import Pool

from megatron_iml.checkpoint import store
from megatron_iml.checkpoint.conversion.parameter_map import TABLE
from megatron_iml.checkpoint.load import load_run
from megatron_iml.config import Config, ParallelConfig
from megatron_iml.training import optimizer

MASTER, MOMENT = "optimizer.state.param.", "optimizer.state.exp_avg."


@dataclass(frozen=True)
class Layout:
    """A layout that pads a bucket before the last one."""

    ranks: int
    num_rows: int
    hidden_size: int
    parallel: ParallelConfig

    @property
    def config(self) -> Config:
        return runs.run_config(parallel=self.parallel, hidden_size=self.hidden_size)


LAYOUTS = {
    "dp3": Layout(3, 3, 128, ParallelConfig(overlap_grad_reduce=True)),
    "overlap": Layout(2, 4, 64, ParallelConfig(overlap_grad_reduce=True)),
    "pp2-tied-embedding": Layout(2, 4, 96, ParallelConfig(pipeline_model_parallel_size=2)),
}


def save_one_step(config: Config, num_rows: int, folder: Path) -> None:
    """A step of so many rows, then a save."""
    engine = runs.fresh_engine(config)
    runs.take_steps(engine, range(1), num_rows)
    runs.save(engine, folder, 1)


def save_without_remedy(config: Config, num_rows: int, folder: Path, checked: bool) -> str:
    """The same with megatron-core's optimizer; returns what the check at every save says."""
    unchecked = mock.patch.object(store, "master_weights_problem", lambda tensors: None)
    with mock.patch.object(optimizer, "ReshardableOptimizer", DistributedOptimizer):
        if not checked:
            with unchecked:
                save_one_step(config, num_rows, folder)
            return ""
        with pytest.raises(RuntimeError) as caught:
            save_one_step(config, num_rows, folder)
    return str(caught.value)


def read_tensors(folder: Path) -> dict[str, Any]:
    return dist_checkpointing.load_plain_tensors(str(folder / "iter_0000001"))


def shifted_masters(state: dict[str, Any]) -> list[str]:
    """Master weights that are not the weights."""
    names = [name.removeprefix(MASTER) for name in state if name.startswith(MASTER)]
    assert len(names) == len(TABLE)
    return [name for name in names if not torch.equal(state[MASTER + name], state[name])]


@pytest.mark.parametrize("name", LAYOUTS)
def test_padded_buckets_are_saved_right(pool: Pool, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    alone = runs.run_config(hidden_size=layout.hidden_size)
    pool.run(save_one_step, 1, alone, layout.num_rows, tmp_path / "single")
    single = pool.run(read_tensors, 1, tmp_path / "single")[0]
    pool.run(save_one_step, layout.ranks, layout.config, layout.num_rows, tmp_path / "several")
    several = pool.run(read_tensors, 1, tmp_path / "several")[0]
    assert shifted_masters(several) == []
    for key in several:
        if key.startswith(MOMENT):
            # After one step the moment is a tenth of the gradient: equal to the order of its sums.
            error = (several[key] - single[key]).abs().max()
            assert error < 1e-5 * single[key].abs().max() + 1e-9, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_the_remedy_they_are_not(pool: Pool, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    pool.run(save_without_remedy, layout.ranks, layout.config, layout.num_rows, tmp_path, False)
    shifted = shifted_masters(pool.run(read_tensors, 1, tmp_path)[0])
    assert shifted, "has megatron-core been mended?"


def test_a_save_that_would_be_shifted_stops_every_rank(pool: Pool, tmp_path: Path) -> None:
    layout = LAYOUTS["pp2-tied-embedding"]
    arguments = (layout.config, layout.num_rows, tmp_path, True)
    messages = pool.run(save_without_remedy, layout.ranks, *arguments)
    assert all("differ from the model's" in message for message in messages), messages
    assert store.complete_checkpoints(tmp_path) == []


class TorchAdamW(torch.optim.AdamW):
    """torch's own AdamW on megatron-core's groups; its state holds a step per parameter."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__([torch.nn.Parameter(torch.empty(0))], betas=betas, eps=eps)
        self.param_groups = [{**self.defaults, **group} for group in groups]


def save_and_load_torch_adamw(folder: Path) -> str:
    plain = mock.patch.object(optimizer, "ReshardableOptimizer", DistributedOptimizer)
    with plain, mock.patch.object(optimizer, "Adam", TorchAdamW):
        engine = runs.fresh_engine(runs.run_config())
        runs.take_steps(engine, range(1))
        runs.save(engine, folder, 1)
        with pytest.raises(KeyError) as caught:
            load_run(folder / "iter_0000001", engine)
    return str(caught.value)


def test_torchs_adamw_cannot_be_loaded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(save_and_load_torch_adamw, 1, tmp_path) == ["'step'"]
