"""Worlds of 1 to 8 ranks for tests, each rank a process of its own: gloo on the CPU, or NCCL with a GPU each.

    pool.run(function, 4, argument, ...)     ->  [result of rank 0, ..., result of rank 3]

`function` is a module-level function of any test or helper file. It runs on every rank inside a joined world,
where `start_distributed(config)` builds the groups of a layout.

A fork server imports torch and megatron-core once (seconds); a rank is then a fork of it (milliseconds) that
does one job and ends. Processes are not used again: gloo's threads outlive their groups, and spin once a peer
has left, so that after a few jobs they would have the cores to themselves.
"""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_iml.parallel.groups import stop_distributed

MAX_RANKS = 8
PRELOAD = [
    "megatron_iml.checkpoint.store",
    "megatron_iml.training.prepare",
    "megatron_iml.training.self_test",
    "megatron_iml.model.initialise",
    "pytest",
]


class RemoteError(Exception):
    """A rank's traceback."""


@dataclass(frozen=True)
class Job:
    """What one rank is asked to do."""

    module: str
    file: str
    function: str
    arguments: tuple[Any, ...]
    rank: int
    world_size: int
    port: int
    timeout_seconds: float
    on_gpus: bool


@dataclass(frozen=True)
class Worker:
    """A process and our end of its pipe."""

    process: ForkServerProcess
    connection: Connection

    def end(self) -> None:
        """Stop the process whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Starts the ranks of one job at a time, at most `MAX_RANKS`."""

    def __init__(self, on_gpus: bool = False) -> None:
        self.on_gpus = on_gpus
        # Asked otherwise, CUDA would start in the fork server, and a fork cannot start it again.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def run(
        self, function: Callable[..., Any], ranks: int, *arguments: Any, timeout_seconds: float = 300.0
    ) -> list[Any]:
        """Run `function(*arguments)` on so many ranks of one world and return every rank's result.

        Raises:
            RemoteError: the traceback of the first rank that failed.
            TimeoutError: if a rank does not answer in time, naming those that did not.
        """
        assert 1 <= ranks <= MAX_RANKS, f"{ranks} ranks asked of a pool of {MAX_RANKS}"
        if self.on_gpus and ranks > torch.cuda.device_count():
            pytest.skip(f"{ranks} ranks want a GPU each; this machine has {torch.cuda.device_count()}")
        # Port 0: the system picks one, and this process holds it, so nothing can collide.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        module = function.__module__
        file = str(sys.modules[module].__file__)
        workers: list[Worker] = []
        try:
            for rank in range(ranks):
                job = Job(
                    module,
                    file,
                    function.__name__,
                    arguments,
                    rank,
                    ranks,
                    store.port,
                    timeout_seconds,
                    self.on_gpus,
                )
                workers.append(self._start(job))
            results = collect(workers, function.__name__, timeout_seconds)
            for worker in workers:
                # A rank that ends by itself takes along what it started, such as a save's helpers.
                worker.process.join(timeout=10.0)
            return results
        finally:
            # Also after a failure: the other ranks may wait for a collective that never comes.
            for worker in workers:
                worker.end()

    def _start(self, job: Job) -> Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=run_in_world, args=(theirs, pickle.dumps(job)))
        process.start()
        theirs.close()
        return Worker(process, ours)


def collect(workers: list[Worker], name: str, timeout_seconds: float) -> list[Any]:
    """Every rank's result, in the order of ranks."""
    deadline = time.monotonic() + timeout_seconds
    missing = {worker.connection: rank for rank, worker in enumerate(workers)}
    results: list[Any] = [None] * len(workers)
    while missing:
        ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(
                f"{name} on {len(workers)} ranks: ranks {sorted(missing.values())} did not answer in time"
            )
        for connection in ready:
            assert isinstance(connection, Connection), f"unexpected object {connection} in the pool"
            rank = missing.pop(connection)
            try:
                succeeded, results[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise RemoteError(f"{name}: rank {rank} of {len(workers)} died without a word") from None
            if not succeeded:
                raise RemoteError(f"{name} failed on rank {rank} of {len(workers)}:\n{results[rank]}")
    return results


def run_in_world(connection: Connection, pickled_job: bytes) -> None:
    """A rank's life: join the world, run the function, leave the world, answer."""
    job: Job = pickle.loads(pickled_job)
    torch.set_num_threads(1)
    # A rank that crashes in somebody's C++ says in which call.
    faulthandler.enable()
    # Every rank would repeat what megatron-core says of missing optional packages.
    warnings.simplefilter("ignore")
    # Before anything asks for CUDA, which then answers for this process as the job needs it.
    os.environ["LOCAL_RANK"] = str(job.rank)
    if job.on_gpus:
        torch.cuda.set_device(job.rank)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        store = dist.TCPStore("127.0.0.1", job.port, is_master=False)
        # The pool's own deadline comes before this timeout.
        timeout = timedelta(seconds=2 * job.timeout_seconds + 60)
        dist.init_process_group(
            # Tests compare small CPU tensors too.
            "cpu:gloo,cuda:nccl" if job.on_gpus else "gloo",
            store=store,
            rank=job.rank,
            world_size=job.world_size,
            timeout=timeout,
        )
        result = vars(load(job.module, job.file))[job.function](*job.arguments)
    except Exception:  # whatever it is, the test that asked gets it
        # Before this rank leaves: the others' complaints about that must come later than the cause.
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return
    stop_distributed()
    connection.send_bytes(pickle.dumps((True, result)))


def load(name: str, file: str) -> ModuleType:
    """A module by file: tests/ is no package, so a test module has a name that nothing can be imported by."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, f"no module in {file}"
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
