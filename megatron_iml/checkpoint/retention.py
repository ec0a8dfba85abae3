"""Which checkpoints stay, and what a run that died has left behind.

saved 10, 20, 30, 40, 50 with keep_last 2, keep_every 20, keep_best 1 (the lowest loss was that of 30)
kept      20, 30, 40, 50
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_iml.config import CheckpointConfig

from .record import COMPLETE_NAME, MARKER, complete_checkpoints, read_record, step_of

REMOVED = ".removed"
PARTIAL = ".partial"


def steps_to_keep(losses: Mapping[int, Mapping[str, float]], keep: CheckpointConfig) -> set[int]:
    """Which of these steps stay.

    Args:
        losses: step of every complete checkpoint -> validation loss per level, empty if none was measured.
        keep: the options keep_last, keep_every, keep_best and best_level.
    """
    steps = sorted(losses)
    # The configuration's keep_last is 1 or more; a slice from -0 would be all of them.
    kept = set(steps[-keep.keep_last :])
    if keep.keep_every:
        kept |= {step for step in steps if step % keep.keep_every == 0}
    measured = [step for step in steps if losses[step]]
    # Of equal losses the later step: it has seen more.
    ranked = sorted(measured, key=lambda step: (_loss(losses[step], keep.best_level), -step))
    return kept | set(ranked[: keep.keep_best])


def _loss(by_level: Mapping[str, float], level: str | None) -> float:
    # A level that an earlier configuration did not measure: that checkpoint is nobody's best.
    if level is not None:
        return by_level.get(level, float("inf"))
    return sum(by_level.values()) / len(by_level)


class Remover:
    """Removes folders without keeping anybody waiting: hidden at once, deleted by a thread."""

    def __init__(self) -> None:
        # One thread: deletions are bound by the disk. The interpreter waits for it before it ends.
        self.thread = ThreadPoolExecutor(1)

    def remove(self, folder: Path) -> None:
        """Hide a checkpoint from readers and begin to delete it."""
        # A rename is one step, so a removal that is killed half way leaves nothing that looks complete.
        hidden = folder.rename(folder.with_name(folder.name + REMOVED))
        self.thread.submit(shutil.rmtree, hidden, ignore_errors=True)


def drop_old(directory: Path, keep: CheckpointConfig, remover: Remover) -> None:
    """Remove the complete checkpoints that need not stay."""
    losses = {}
    for folder in complete_checkpoints(directory):
        # Of another format version, or damaged: whatever it is, it is not this run's to remove.
        with suppress(ValueError):
            losses[step_of(folder)] = read_record(folder).validation
    kept = steps_to_keep(losses, keep)
    for folder in complete_checkpoints(directory):
        if (step := step_of(folder)) in losses and step not in kept:
            remover.remove(folder)


def sweep(directory: Path) -> list[str]:
    """Delete what saves and removals that were killed have left; returns the folders' names."""
    left = [folder for folder in sorted(directory.glob("iter_*")) if folder.suffix in (PARTIAL, REMOVED)]
    for folder in left:
        # The last process of a run that was just killed may still put a file there; the next start gets it.
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in left]


def strangers(directory: Path) -> list[str]:
    """Names of folders that are called as a complete checkpoint is and have no record."""
    # Never ours: those get their name by a rename, when the record is in them. Megatron-LM calls its own so,
    # and a copy that is under way is one for a while. Deleting them would be deleting somebody's work.
    found = [folder for folder in directory.glob("iter_*") if COMPLETE_NAME.fullmatch(folder.name)]
    return sorted(folder.name for folder in found if not (folder / MARKER).is_file())
