"""Two faults of megatron-core 0.16.1 in reshardable checkpoints, and that our remedies are what removes them.

With three data ranks no bucket's end is a multiple of what three ranks share, so every bucket is padded; the
plain DistributedOptimizer then saves each parameter behind a padded bucket shifted. torch's own AdamW saves,
but no load follows. When either test finds that the fault is gone, the remedy can go too.
"""

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
from megatron_iml.checkpoint.parameter_map import TABLE
from megatron_iml.config import Config
from megatron_iml.training import optimizer

STATE = store.RunState(step=1, rows_consumed=3, plan_fingerprint="abc")
MASTER, MOMENT = "optimizer.state.param.", "optimizer.state.exp_avg."


def save_one_step(config: Config, folder: Path) -> None:
    """A step of three rows, then a save."""
    engine = runs.fresh_engine(config)
    runs.take_steps(engine, range(1), num_rows=3)
    store.CheckpointStore(folder, keep_last=1, asynchronous=False).save(engine, STATE)


def save_without_remedy(config: Config, folder: Path, checked: bool) -> str:
    """The same with megatron-core's optimizer; returns what the check at every save says."""
    unchecked = mock.patch.object(store, "check_master_weights", lambda tensors: None)
    with mock.patch.object(optimizer, "PaddedBucketOptimizer", DistributedOptimizer):
        if not checked:
            with unchecked:
                save_one_step(config, folder)
            return ""
        with pytest.raises(RuntimeError) as caught:
            save_one_step(config, folder)
    return str(caught.value)


def read_tensors(folder: Path) -> dict[str, Any]:
    return dist_checkpointing.load_plain_tensors(str(folder / "iter_0000001"))


def padded_config() -> Config:
    return runs.run_config(parallel=runs.ParallelConfig(overlap_grad_reduce=True), hidden_size=128)


def shifted_masters(state: dict[str, Any]) -> list[str]:
    """Master weights that are not the weights."""
    names = [name.removeprefix(MASTER) for name in state if name.startswith(MASTER)]
    assert len(names) == len(TABLE)
    return [name for name in names if not torch.equal(state[MASTER + name], state[name])]


def test_padded_buckets_are_saved_right(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_one_step, 1, padded_config(), tmp_path / "single")
    single = pool.run(read_tensors, 1, tmp_path / "single")[0]
    pool.run(save_one_step, 3, padded_config(), tmp_path / "three")
    three = pool.run(read_tensors, 1, tmp_path / "three")[0]
    assert shifted_masters(three) == []
    for name in three:
        if name.startswith(MOMENT):
            # After one step the moment is a tenth of the gradient: equal to the order of its sums.
            error = (three[name] - single[name]).abs().max()
            assert error < 1e-5 * single[name].abs().max() + 1e-9, f"{name}: {error:.1e}"


def test_without_the_remedy_they_are_not_and_the_save_stops(pool: Pool, tmp_path: Path) -> None:
    messages = pool.run(save_without_remedy, 3, padded_config(), tmp_path / "checked", True)
    assert all("master weights gathered for saving differ" in message for message in messages), messages
    assert store.complete_checkpoints(tmp_path / "checked") == []
    pool.run(save_without_remedy, 3, padded_config(), tmp_path / "unchecked", False)
    shifted = shifted_masters(pool.run(read_tensors, 1, tmp_path / "unchecked")[0])
    assert len(shifted) > 5, f"only {shifted} are shifted: has megatron-core been mended?"


class TorchAdamW(torch.optim.AdamW):
    """torch's own AdamW on megatron-core's groups; its state holds a step per parameter."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__([torch.nn.Parameter(torch.empty(0))], betas=betas, eps=eps)
        self.param_groups = [{**self.defaults, **group} for group in groups]


def save_and_load_torch_adamw(folder: Path) -> str:
    with mock.patch.object(optimizer, "Adam", TorchAdamW):
        engine = runs.fresh_engine(runs.run_config())
        runs.take_steps(engine, range(1))
        store.CheckpointStore(folder, keep_last=1, asynchronous=False).save(engine, STATE)
        with pytest.raises(KeyError) as caught:
            store.load_run(folder / "iter_0000001", engine)
    return str(caught.value)


def test_torchs_adamw_cannot_be_loaded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(save_and_load_torch_adamw, 1, tmp_path) == ["'step'"]
