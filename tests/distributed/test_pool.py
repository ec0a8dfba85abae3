"""The pool itself: results of all ranks, tracebacks, hangs that end, and other worlds after them."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RemoteError


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def own_process() -> int:
    return os.getpid()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has a reason")
    dist.barrier()


def hang_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_every_size_of_world(pool: Pool) -> None:
    assert pool.run(sum_of_ranks, 2, 10) == [(0, 21), (1, 21)]
    assert pool.run(sum_of_ranks, 4, 10) == [(0, 46), (1, 46), (2, 46), (3, 46)]


def test_no_process_outlives_its_job(pool: Pool) -> None:
    for process in pool.run(own_process, 2):
        assert not Path(f"/proc/{process}").exists()


def test_a_rank_that_fails_hands_back_its_traceback(pool: Pool) -> None:
    with pytest.raises(RemoteError, match="rank one has a reason") as caught:
        pool.run(fail_on_rank_one, 2)
    assert "in fail_on_rank_one" in str(caught.value)
    assert pool.run(sum_of_ranks, 2, 0)[1] == (1, 1)


def test_a_hang_ends_and_names_the_ranks(pool: Pool) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hang_on_rank_zero on 2 ranks: ranks \[0\] did not answer"):
        pool.run(hang_on_rank_zero, 2, timeout_seconds=15.0)
    assert time.monotonic() - began < 60
    assert pool.run(sum_of_ranks, 1, 5)[0] == (0, 5)
