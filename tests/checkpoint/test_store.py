"""Checkpoints of one rank: complete or absent, kept or dropped, refused with a reason."""

import dataclasses
import json
from pathlib import Path

import pytest
import runs
import torch
from torch import Tensor

from megatron_iml.checkpoint.store import (
    CheckpointStore,
    RunState,
    complete_checkpoints,
    load_run,
    load_weights,
    read_record,
)
from megatron_iml.model.initialise import initialise
from megatron_iml.training.engine import Engine


def state(step: int) -> RunState:
    return RunState(step, 4 * step, "abc")


def weights(engine: Engine) -> list[Tensor]:
    return [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_resumed_steps_are_the_steps_that_would_have_been(
    tmp_path: Path, precision: str, asynchronous: bool
) -> None:
    config = runs.run_config(precision, num_layers=2)
    # The fp16 loss scale doubles in the first step after the save, if its count of clean steps came back.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, loss_scale_window=3))
    with runs.alone(config) as engine:
        runs.take_steps(engine, range(2))
        saved = weights(engine)
        store = CheckpointStore(tmp_path, keep_last=2, asynchronous=asynchronous)
        folder = store.save(engine, state(2))
        if asynchronous:
            assert complete_checkpoints(tmp_path) == [], "complete before it was finished"
        # The files must hold what was there when the save began.
        unbroken = runs.take_steps(engine, range(2, 4))
        store.wait()
    assert [step.loss_scale for step in unbroken] == ([256.0] * 2 if precision == "fp16" else [1.0] * 2)
    assert complete_checkpoints(tmp_path) == [folder]
    with runs.alone(config) as engine:
        initialise(engine.chunks, config.model, 99, engine.layout)
        assert load_run(folder, engine) == state(2)
        assert equal(weights(engine), saved)
        assert runs.take_steps(engine, range(2, 4)) == unbroken


def test_weights_alone_leave_the_rest_fresh(tmp_path: Path) -> None:
    config = runs.run_config(num_layers=2)
    with runs.alone(config) as engine:
        runs.take_steps(engine, range(1))
        folder = CheckpointStore(tmp_path, 1, asynchronous=False).save(engine, state(1))
        saved = weights(engine)
    with runs.alone(config) as engine:
        initialise(engine.chunks, config.model, 99, engine.layout)
        load_weights(folder, engine.chunks, config.model)
        assert equal(weights(engine), saved)
        groups = engine.optimizer.chained_optimizers[0].optimizer.param_groups
        assert [group["step"] for group in groups] == [0, 0]


def test_what_is_complete_what_is_kept_and_what_is_not(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        store = CheckpointStore(tmp_path, keep_last=2, asynchronous=False)
        for step in (1, 2, 3):
            store.save(engine, state(step))
        names = ["iter_0000002", "iter_0000003"]
        assert [folder.name for folder in complete_checkpoints(tmp_path)] == names
        assert sorted(folder.name for folder in tmp_path.glob("iter_*")) == names
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
        record = read_record(tmp_path / "iter_0000003")
        assert record["state"] == {
            "step": 3,
            "rows_consumed": 12,
            "plan_fingerprint": "abc",
            "tokenizer_sha256": "",
        }
        assert record["config"]["model"]["hidden_size"] == 64
        # A save that was killed: everything is there but the marker, and then not even that much.
        (tmp_path / "iter_0000003" / "complete.json").unlink()
        assert [folder.name for folder in complete_checkpoints(tmp_path)] == names[:1]
        with pytest.raises(FileNotFoundError, match=r"no complete checkpoint.*\['iter_0000002'\]"):
            load_run(tmp_path / "iter_0000003", engine)
        (tmp_path / "iter_0000003" / "leftover.distcp").write_text("half")
        store.save(engine, state(3))
        assert [folder.name for folder in complete_checkpoints(tmp_path)] == names
        assert not (tmp_path / "iter_0000003" / "leftover.distcp").exists()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        folder = CheckpointStore(tmp_path, 1, asynchronous=False).save(engine, state(1))
    larger = runs.run_config(num_layers=4, hidden_size=128)
    with runs.alone(larger) as engine:
        before = weights(engine)
        with pytest.raises(ValueError) as caught:
            load_run(folder, engine)
        with pytest.raises(ValueError, match="another size"):
            load_weights(folder, engine.chunks, larger.model)
        assert equal(weights(engine), before)
    assert (
        "is a model of another size: num_layers 4 here, 2 there; hidden_size 128 here, 64 there; "
        "ffn_hidden_size 512 here, 256 there. Set the model section"
    ) in str(caught.value)


def test_another_formats_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "complete.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="has checkpoint format 99, this version reads 1"):
        read_record(tmp_path)


def test_master_weights_that_are_not_the_weights_are_not_saved(tmp_path: Path) -> None:
    with runs.alone(runs.run_config("bf16", num_layers=2)) as engine:
        # Changed behind the optimizer's back, as a shifted gather would look.
        engine.chunks[0].decoder.final_layernorm.weight.data += 1.0
        with pytest.raises(
            RuntimeError, match=r"differ from the model's in 1 of \d+ tensors, first decoder.final_"
        ):
            CheckpointStore(tmp_path, 1, asynchronous=False).save(engine, state(1))
    assert complete_checkpoints(tmp_path) == []
