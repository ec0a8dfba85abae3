"""What a rank saves: megatron-core's form, whole, and nothing that stays in memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_iml.checkpoint.load import load_run
from megatron_iml.checkpoint.sharded import owned_bytes, sharded_chunks, sharded_state, sharding
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig


def without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The rest, and of each tensor what it is called, where it goes and where it lies."""
    tensors = [
        (tensor.key, tensor.global_offset, tensor.replica_id, tensor.data.data_ptr())
        for tensor in nested_values(state["param_state"])
    ]
    return {**state, "param_state": tensors}


@pytest.mark.parametrize("is_loading", [False, True])
def test_the_form_is_megatron_cores(is_loading: bool) -> None:
    """A newer version that puts more into it must be noticed: ours is made without asking its code."""
    with runs.alone(runs.run_config("fp16", num_layers=2)) as engine:
        runs.take_steps(engine, range(0 if is_loading else 2))
        weights = sharded_chunks(engine.chunks)["model"]
        (optimizer,) = engine.optimizer.chained_optimizers
        ours = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=sharding())
        theirs = DistributedOptimizer.sharded_state_dict(
            optimizer, weights, is_loading=is_loading, metadata=sharding()
        )
    assert len(without_tensors(ours)["param_state"]) == 3 * len(list(engine.chunks[0].parameters()))
    assert without_tensors(ours) == without_tensors(theirs)


def test_another_form_is_refused() -> None:
    with (
        runs.alone(runs.run_config(num_layers=2)) as engine,
        pytest.raises(AssertionError, match="checkpoint form None; this optimizer knows"),
    ):
        engine.optimizer.sharded_state_dict(sharded_chunks(engine.chunks)["model"])


def test_a_rank_counts_its_optimizer_state_and_the_first_the_weights() -> None:
    with runs.alone(runs.run_config("bf16", num_layers=2)) as engine:
        runs.take_steps(engine, range(1))
        parameters = sum(parameter.numel() for parameter in engine.chunks[0].parameters())
        state = sharded_state(engine, is_loading=False)
    # fp32 weights and two moments; in bf16 the weights themselves.
    assert owned_bytes(state, data_rank=1) == 12 * parameters
    assert owned_bytes(state, data_rank=0) == 14 * parameters


def bytes_of_tensors() -> int:
    """Of everything that a tensor of this process keeps in memory."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes() for one in (t.untyped_storage() for t in tensors)}.values())


def test_saves_and_loads_leave_no_memory_to_the_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core collects garbage in each, for runs that collect none: without that, nothing may stay."""
    collect, calls = gc.collect, []
    monkeypatch.setattr(gc, "collect", lambda *generation: calls.append(generation))
    with runs.alone(runs.run_config("bf16", num_layers=2)) as engine:
        runs.take_steps(engine, range(1))
        store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=False))
        collect()
        gc.disable()
        try:
            before = bytes_of_tensors()
            for step in (1, 2, 3):
                store.save(engine, runs.state_at(step), {})
                load_run(tmp_path / f"iter_{step:07d}", engine)
            assert bytes_of_tensors() == before
        finally:
            gc.enable()
    assert calls == []
