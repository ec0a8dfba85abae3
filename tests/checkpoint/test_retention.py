"""Which checkpoints stay, and what is cleared away."""

from pathlib import Path

import pytest
from checkpoint.test_record import write_checkpoint

from megatron_iml.checkpoint.record import complete_checkpoints
from megatron_iml.checkpoint.retention import Remover, drop_old, steps_to_keep, sweep
from megatron_iml.config import CheckpointConfig

LOSSES = {
    10: {"held_out": 3.0, "supervised": 1.0},
    20: {"held_out": 2.0, "supervised": 2.5},
    30: {"held_out": 2.0, "supervised": 2.5},
    40: {},
    50: {"held_out": 4.0, "supervised": 4.0},
    60: {"supervised": 0.5},
}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, {60}),
        ({"keep_last": 9}, {10, 20, 30, 40, 50, 60}),
        ({"keep_last": 1, "keep_every": 20}, {20, 40, 60}),
        # Means over levels: 2.0, 2.25, 2.25, none, 4.0, 0.5; of two that are equal the later.
        ({"keep_last": 1, "keep_best": 1}, {60}),
        ({"keep_last": 1, "keep_best": 3}, {60, 10, 30}),
        # Of one level: 3.0, 2.0, 2.0, none, 4.0, not measured.
        ({"keep_last": 1, "keep_best": 1, "best_level": "held_out"}, {60, 30}),
        ({"keep_last": 1, "keep_best": 2, "best_level": "held_out"}, {60, 30, 20}),
        ({"keep_last": 2, "keep_every": 30, "keep_best": 1, "best_level": "held_out"}, {50, 60, 30}),
    ],
)
def test_steps_to_keep(options: dict, kept: set[int]) -> None:
    assert steps_to_keep(LOSSES, CheckpointConfig(**options)) == kept


def test_dropped_ones_are_gone_and_what_cannot_be_read_stays(tmp_path: Path) -> None:
    for step, losses in LOSSES.items():
        write_checkpoint(tmp_path, step, losses)
    (tmp_path / "iter_0000020" / "complete.json").write_text("{}")
    remover = Remover()
    drop_old(tmp_path, CheckpointConfig(keep_last=1, keep_best=1, best_level="held_out"), remover)
    remover.thread.shutdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000020",
        "iter_0000030",
        "iter_0000060",
    ]


def test_a_removed_checkpoint_is_hidden_before_it_is_deleted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    remover = Remover()
    # The thread never gets to it, as if the run were killed right here.
    remover.thread.shutdown()
    with pytest.raises(RuntimeError):
        remover.remove(folder)
    assert complete_checkpoints(tmp_path) == []
    assert sweep(tmp_path) == ["iter_0000010.removed"]
    assert list(tmp_path.iterdir()) == []


def test_sweeping_takes_debris_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20).rename(tmp_path / "iter_0000020.1f3a.partial")
    # As a copy under way, or Megatron-LM's own.
    (write_checkpoint(tmp_path, 30) / "complete.json").unlink()
    others = ("iter_notes", "latest_checkpointed_iteration.txt")
    for name in others:
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == ["iter_0000020.1f3a.partial"]
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000010", "iter_0000030", *others}
    assert sweep(tmp_path) == [] and sweep(tmp_path / "not there") == []
