"""A background save holds the state of its step, whatever training does while a device is copied from."""

from pathlib import Path

import runs
import torch
from pool import Pool

from megatron_iml.checkpoint.load import load_run
from megatron_iml.checkpoint.record import damage, read_record
from megatron_iml.checkpoint.staging import Gate, Staging
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config
from megatron_iml.model.initialise import initialise


class SlowDevice(Staging):
    """Host memory as if it were a device's, and copies that are made in the last moment allowed."""

    late: Gate | None = None

    def must_copy(self, tensor: torch.Tensor) -> bool:
        return True

    def begin(self, gate: Gate) -> None:
        self.late = gate

    def settle(self) -> None:
        if self.late is not None:
            super().begin(self.late)
            self.late = None
        super().settle()


def save_and_go_on(config: Config, folder: Path, told: bool) -> list[runs.StepResult]:
    """Two steps, a save through staging, two more while it is under way, which tell it of their updates."""
    engine = runs.fresh_engine(config)
    runs.take_steps(engine, range(2))
    store = CheckpointStore(folder, CheckpointConfig())
    store.staging = SlowDevice()
    store.reserve(engine)
    reserved = store.staging.size
    store.save(engine, runs.state_at(2), {})
    assert store.staging.size == reserved > 0, "a save had to make memory"
    steps = runs.take_steps(engine, range(2, 4), before_update=store.before_update if told else None)
    store.wait()
    return steps


def load_and_go_on(config: Config, folder: Path) -> list[runs.StepResult]:
    engine = runs.fresh_engine(config)
    initialise(engine.chunks, config.model, 99, engine.layout)
    load_run(folder / "iter_0000002", engine)
    return runs.take_steps(engine, range(2, 4))


def test_the_state_of_its_step_is_saved(pool: Pool, tmp_path: Path) -> None:
    config = runs.run_config("bf16", num_layers=2)
    unbroken = pool.run(save_and_go_on, 2, config, tmp_path, True)
    folder = tmp_path / "iter_0000002"
    assert damage(folder, read_record(folder).files) == []
    assert pool.run(load_and_go_on, 2, config, tmp_path) == unbroken


def test_without_waiting_before_the_update_another_state_would_be(pool: Pool, tmp_path: Path) -> None:
    config = runs.run_config("bf16", num_layers=2)
    unbroken = pool.run(save_and_go_on, 2, config, tmp_path, False)
    assert pool.run(load_and_go_on, 2, config, tmp_path) != unbroken
