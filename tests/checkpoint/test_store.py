"""Checkpoints of one rank: complete or absent, kept or dropped, and what a refusing disk does to a run."""

import dataclasses
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

from megatron_iml.checkpoint.background import SaveFailed
from megatron_iml.checkpoint.load import load_run
from megatron_iml.checkpoint.record import complete_checkpoints, damage, read_record
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig
from megatron_iml.model.initialise import initialise

FILES = {
    "weights_00000.distcp",
    "optimizer_00000.distcp",
    "common.pt",
    ".metadata",
    "metadata.json",
}


def in_foreground(**options: object) -> CheckpointConfig:
    return CheckpointConfig(asynchronous=False, **options)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """As on a disk that is full: a write beyond so many bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
        saved = runs.weights_of(engine)
        store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=asynchronous))
        store.save(engine, runs.state_at(2), {})
        if asynchronous:
            assert complete_checkpoints(tmp_path) == [], "complete before it was finished"
        # The files must hold what was there when the save began.
        unbroken = runs.take_steps(engine, range(2, 4))
        store.wait()
    assert [step.loss_scale for step in unbroken] == ([256.0] * 2 if precision == "fp16" else [1.0] * 2)
    folder = tmp_path / "iter_0000002"
    assert complete_checkpoints(tmp_path) == [folder]
    with runs.alone(config) as engine:
        initialise(engine.chunks, config.model, 99, engine.layout)
        assert load_run(folder, engine) == runs.state_at(2)
        assert runs.same_bits(runs.weights_of(engine), saved)
        assert runs.take_steps(engine, range(2, 4)) == unbroken


def test_what_a_checkpoint_carries(tmp_path: Path) -> None:
    config = runs.run_config(num_layers=2)
    with runs.alone(config) as engine:
        CheckpointStore(tmp_path, in_foreground()).save(engine, runs.state_at(3), {"fully_held_out": 2.5})
    folder = tmp_path / "iter_0000003"
    record = read_record(folder)
    assert record.state == runs.state_at(3)
    assert record.config == dataclasses.asdict(config)
    assert record.validation == {"fully_held_out": 2.5} and record.world_size == 1
    assert record.versions["torch"] == torch.__version__ and set(record.versions) > {"megatron_core"}
    assert set(record.files) == FILES == {path.name for path in folder.iterdir()} - {"complete.json"}
    assert damage(folder, record.files) == []
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert list(tmp_path.glob("*.partial")) == []


def test_every_file_is_forced_to_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forced, sync = tmp_path / "iter_0000001", set(), os.fsync

    def noted(descriptor: int) -> None:
        if not folder.exists():
            forced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        CheckpointStore(tmp_path, in_foreground()).save(engine, runs.state_at(1), {})
    late = [path.name for path in [folder, *folder.iterdir()] if path.stat().st_ino not in forced]
    assert late == []


def test_old_ones_go_when_a_new_one_is_complete(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        store = CheckpointStore(tmp_path, in_foreground(keep_last=1, keep_best=1))
        for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
            store.save(engine, runs.state_at(step), {"level": loss})
    store.remover.thread.shutdown()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]


def test_a_start_clears_debris_and_mends_the_pointer(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        runs.save(engine, tmp_path, 3)
        (tmp_path / "latest_checkpointed_iteration.txt").unlink()
        (tmp_path / "iter_0000004.1f.partial").mkdir()
        store = CheckpointStore(tmp_path, in_foreground())
        assert store.tidy() == ["removed what a run that died has left: iter_0000004.1f.partial"]
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
        assert store.tidy() == []
        (tmp_path / "iter_0000005").mkdir()
        (said,) = store.tidy()
        assert said.startswith("left alone: iter_0000005 in") and (tmp_path / "iter_0000005").is_dir()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        folder = runs.save(engine, tmp_path, 3)
        before = read_record(folder)
        runs.take_steps(engine, range(1))
        store = CheckpointStore(tmp_path, in_foreground())
        (said,) = store.save(engine, runs.state_at(3), {})
        assert "iter_0000003 is already there, and nothing is overwritten" in said
    assert read_record(folder) == before and damage(folder, before.files) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_training_goes_on(tmp_path: Path, asynchronous: bool) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=asynchronous))
        store.save(engine, runs.state_at(1), {})
        store.wait()
        before = read_record(tmp_path / "iter_0000001")
        # Room for the weights, but not for the optimizer's three numbers a weight.
        with files_limited_to(2 * before.files["weights_00000.distcp"].bytes):
            said = store.save(engine, runs.state_at(2), {})
            # In the background the failure is heard of when the writing process has ended.
            while not said:
                said = store.poll()
        assert "NOT SAVED: " in said[0] and "optimizer_00000.distcp: [Errno 27] File too large" in said[0]
        assert complete_checkpoints(tmp_path) == [tmp_path / "iter_0000001"]
        assert damage(tmp_path / "iter_0000001", before.files) == []
        # There is room again.
        store.save(engine, runs.state_at(3), {})
        assert "saved" in store.wait()[-1] if asynchronous else store.wait() == []
    store.remover.thread.shutdown()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000003"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_refused_first_file_is_said(tmp_path: Path, asynchronous: bool) -> None:
    """As under a quota, which is not in the free space that is looked at."""
    with runs.alone(runs.run_config(num_layers=2)) as engine, files_limited_to(100):
        store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=asynchronous))
        (said,) = store.save(engine, runs.state_at(1), {})
    assert f"NOT SAVED: [Errno 27] File too large; in {tmp_path}; training goes on" in said
    store.remover.thread.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_description_is_said(tmp_path: Path) -> None:
    """The writing process has its files whole, and then rank 0 cannot write what lies where."""
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        store = CheckpointStore(tmp_path, CheckpointConfig())
        store.save(engine, runs.state_at(1), {})
        with files_limited_to(100):
            while not (said := store.poll()):
                pass
        assert "NOT SAVED: [Errno 27] File too large" in said[0]
        store.save(engine, runs.state_at(2), {})
        assert "saved" in store.wait()[0]
    store.remover.thread.shutdown()
    assert complete_checkpoints(tmp_path) == [tmp_path / "iter_0000002"]
    assert [path.name for path in tmp_path.glob("*.partial*")] == []


def test_two_failures_in_a_row_end_the_run_and_so_does_the_last(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine, files_limited_to(300_000):
        store = CheckpointStore(tmp_path, in_foreground())
        assert "NOT SAVED" in store.save(engine, runs.state_at(1), {})[0]
        with pytest.raises(SaveFailed, match="File too large"):
            store.wait()
        with pytest.raises(SaveFailed, match="File too large"):
            store.save(engine, runs.state_at(2), {})
    store.remover.thread.shutdown()
    assert list(tmp_path.glob("iter_*")) == []


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        parameters = sum(parameter.numel() for parameter in engine.chunks[0].parameters())
        store = CheckpointStore(tmp_path, in_foreground())
        (said,) = store.save(engine, runs.state_at(1), {})
    store.remover.thread.shutdown()
    # A weight, its fp32 copy and two moments, 4 bytes each.
    assert f"step 1 needs {16 * parameters / 1e9:.3f} GB" in said and "has 0.001 GB free" in said
    assert list(tmp_path.iterdir()) == []


def test_master_weights_that_are_not_the_weights_are_not_saved(tmp_path: Path) -> None:
    with runs.alone(runs.run_config("bf16", num_layers=2)) as engine:
        # Changed behind the optimizer's back, as a shifted gather would look.
        engine.chunks[0].decoder.final_layernorm.weight.data += 1.0
        with pytest.raises(
            RuntimeError, match=r"differ from the model's in 1 of \d+ parts, first decoder.final_"
        ):
            CheckpointStore(tmp_path, in_foreground()).save(engine, runs.state_at(1), {})
    assert list(tmp_path.iterdir()) == []
