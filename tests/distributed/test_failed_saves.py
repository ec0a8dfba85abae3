"""What one rank meets during a save all hear of; none waits for a collective that never comes."""

import os
import resource
import signal
import time
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
    while not (said := store.poll()):
        pass
    return "\n".join(said)


def hang(*unused: object) -> None:
    time.sleep(600)


def save_four_times(folder: Path) -> list[str]:
    """Whole, with a full disk on rank 1, whole, with its writer killed; returns what was said each time."""
    engine = runs.fresh_engine(runs.run_config(num_layers=2))
    store = CheckpointStore(folder, CheckpointConfig())
    hit = dist.get_rank() == 1
    said = []
    for step in (1, 2, 3, 4):
        if step == 2 and hit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        # A process that would take ten minutes, so that it is there to be killed.
        write = hang if step == 4 and hit else background.write_files
        with mock.patch.object(background, "write_files", write):
            store.save(engine, runs.state_at(step), {})
        if step == 2 and hit:
            # The writing process has its limit; this one may report.
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if step == 4 and hit:
            os.kill(store.queue.async_calls[0].async_caller.process.pid, signal.SIGKILL)
        said.append(until_something_is_said(store))
    return said


def test_every_rank_hears_of_one_ranks_failure(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(save_four_times, 2, tmp_path):
        assert [line.split()[0] for line in said] == ["saved", "NOT", "saved", "NOT"]
        assert "NOT SAVED: rank 1: weights_00001.distcp: [Errno 27] File too large" in said[1]
        assert "NOT SAVED: rank 1: the process that writes was killed" in said[3]
    found = complete_checkpoints(tmp_path)
    assert [folder.name for folder in found] == ["iter_0000001", "iter_0000003"]
    assert all(damage(folder, read_record(folder).files) == [] for folder in found)
