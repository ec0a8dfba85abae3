"""kill -9 at random moments of saves: always a whole newest checkpoint, always a state to go on from.

Ranks step and save without a pause until one of them dies. The next try starts as a run does: it verifies the
newest checkpoint, clears away what is left, loads and goes on.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import runs
import torch.distributed as dist
from pool import Pool, RemoteError

from megatron_iml.checkpoint.load import check_share_of_files, load_run, newest_checkpoint
from megatron_iml.checkpoint.record import complete_checkpoints, damage, read_record
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig
from megatron_iml.model.initialise import initialise

WRITERS = "writers.txt"


def save_until_killed(folder: Path, killed_rank: int, delay_in_saves: float) -> None:
    """Go on from the newest checkpoint, then step and save until death.

    It comes after as many times the duration of one save, on whatever machine, as `delay_in_saves` says.
    """
    config = runs.run_config(num_layers=2)
    engine = runs.fresh_engine(config)
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2))
    newest = newest_checkpoint(folder)
    step = 0
    if newest is not None:
        initialise(engine.chunks, config.model, 99, engine.layout)
        check_share_of_files(newest, read_record(newest), weights_only=False)
        step = load_run(newest, engine).step
    store.tidy()
    began = time.perf_counter()
    step += 1
    store.save(engine, runs.state_at(step), {})
    store.wait()
    delay_seconds = delay_in_saves * (time.perf_counter() - began)
    if dist.get_rank() == killed_rank:
        threading.Timer(delay_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        step += 1
        store.save(engine, runs.state_at(step), {})
        process = store.queue.async_calls[0].async_caller.process
        with (folder / WRITERS).open("a") as file:
            file.write(f"{process.pid}\n")
        runs.take_steps(engine, range(step, step + 1))
        store.poll()


def assert_no_writer_lingers(folder: Path) -> None:
    """The processes that write end soon after the run that started them."""
    writers = [int(line) for line in (folder / WRITERS).read_text().split()]
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in writers if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive, f"processes {alive} outlived their run"
    (folder / WRITERS).unlink()


def kill_again_and_again(pool: Pool, folder: Path, ranks: int, kills: int) -> None:
    chance = random.Random(7)
    newest_step = 0
    for _ in range(kills):
        with pytest.raises(RemoteError):
            pool.run(save_until_killed, ranks, folder, chance.randrange(ranks), chance.uniform(0.0, 3.0))
        if (folder / WRITERS).is_file():
            assert_no_writer_lingers(folder)
        found = complete_checkpoints(folder)
        for checkpoint in found:
            assert damage(checkpoint, read_record(checkpoint).files) == []
        # What was once complete is only ever followed by something newer.
        step = read_record(found[-1]).state.step
        assert step > newest_step
        newest_step = step
        left = [path for path in folder.glob("iter_*") if path not in found]
        assert len(left) <= 3, f"the debris of earlier tries is still there: {left}"


def test_a_killed_save_leaves_a_state_to_go_on_from(pool: Pool, tmp_path: Path) -> None:
    kill_again_and_again(pool, tmp_path, ranks=1, kills=4)


@pytest.mark.slow
def test_thirty_killed_saves_of_two_ranks(pool: Pool, tmp_path: Path) -> None:
    kill_again_and_again(pool, tmp_path, ranks=2, kills=30)
