"""What one rank meets during a save all hear of; none waits for a collective that never comes."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import runs
import torch.distributed as dist
from pool import Pool

from megatron_iml.checkpoint import background
from megatron_iml.checkpoint.record import complete_checkpoints, damage, read_record
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig


def until_something_is_said(store: CheckpointStore) -> str:
    """What training would print, a step or so later."""
    # As a step does: on a GPU the process that writes waits for this.
    store.before_update()
    while not (said := store.poll()):
        pass
    return "\n".join(said)


def hang(*unused: object) -> None:
    time.sleep(600)


@contextmanager
def disk_full_beyond(size: int, hit: bool) -> Iterator[None]:
    """A write beyond so many bytes of a file fails, here and in processes that are forked here."""
    if hit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def save_again_and_again(folder: Path) -> list[str]:
    """Whole each second time; returns what was said each time.

    Between: a full disk for rank 1's writer, that writer killed, a disk that is full when all files are there
    but rank 0's description of them.
    """
    engine = runs.fresh_engine(runs.run_config(num_layers=2))
    store = CheckpointStore(folder, CheckpointConfig())
    rank = dist.get_rank()
    said = []
    for step in range(1, 7):
        # A process that would take ten minutes, so that it is there to be killed.
        write = hang if step == 4 and rank == 1 else background.write_files
        with (
            mock.patch.object(background, "write_files", write),
            # Over the fork only: the writing process has its limit, this one may report.
            disk_full_beyond(10_000, hit=step == 2 and rank == 1),
        ):
            store.save(engine, runs.state_at(step), {})
        if step == 4 and rank == 1:
            os.kill(store.queue.async_calls[0].async_caller.process.pid, signal.SIGKILL)
        with disk_full_beyond(100, hit=step == 6 and rank == 0):
            said.append(until_something_is_said(store))
    return said


def test_every_rank_hears_of_one_ranks_failure(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(save_again_and_again, 2, tmp_path):
        assert [line.split()[0] for line in said] == ["saved", "NOT", "saved", "NOT", "saved", "NOT"]
        assert "NOT SAVED: rank 1: weights_00001.distcp: [Errno 27] File too large" in said[1]
        assert "NOT SAVED: rank 1: the process that writes was killed" in said[3]
        assert "NOT SAVED: rank 0: [Errno 27] File too large" in said[5]
    found = complete_checkpoints(tmp_path)
    assert [folder.name for folder in found] == ["iter_0000001", "iter_0000003", "iter_0000005"]
    assert all(damage(folder, read_record(folder).files) == [] for folder in found)
