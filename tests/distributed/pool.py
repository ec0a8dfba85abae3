"""Worker processes that a test session starts once, and worlds of 1 to 8 gloo ranks built from them.

    pool.run(function, 4, argument, ...)     ->  [result of rank 0, ..., result of rank 3]

`function` is a module-level function of any test or helper file. It runs on every rank inside a joined world,
where `start_distributed(config)` builds the groups of a layout. Afterwards the groups and the world are taken
down, so the next job may use another number of ranks and another layout.

A fork server imports torch and megatron-core once (seconds); a worker is then a fork of it (milliseconds). So
a job that fails or hangs costs nothing more than its workers, which are ended and replaced.
"""

import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

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
    store: str
    timeout_seconds: float


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
    """At most `MAX_RANKS` workers, started when first needed."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.workers: list[Worker] = []
        # For the whole session: a worker looks for its store's file once more after it has answered, and
        # waits for minutes where that is gone.
        self.folder = tempfile.TemporaryDirectory()
        self.jobs = 0

    def run(
        self, function: Callable[..., Any], ranks: int, *arguments: Any, timeout_seconds: float = 300.0
    ) -> list[Any]:
        """Run `function(*arguments)` on so many ranks of one world and return every rank's result.

        Raises:
            RemoteError: the traceback of the first rank that failed.
            TimeoutError: if a rank does not answer in time, naming those that did not.
        """
        assert 1 <= ranks <= MAX_RANKS, f"{ranks} ranks asked of a pool of {MAX_RANKS}"
        while len(self.workers) < ranks:
            self.workers.append(self._start())
        self.jobs += 1
        module = function.__module__
        for rank, worker in enumerate(self.workers[:ranks]):
            job = Job(
                module,
                str(sys.modules[module].__file__),
                function.__name__,
                arguments,
                rank,
                ranks,
                str(Path(self.folder.name) / f"store_{self.jobs}"),
                timeout_seconds,
            )
            worker.connection.send_bytes(pickle.dumps(job))
        try:
            return self._collect(ranks, function.__name__, time.monotonic() + timeout_seconds)
        except BaseException:
            # Its other ranks may wait for a collective that never comes.
            self.close()
            raise

    def close(self) -> None:
        """End all workers; a later job starts new ones."""
        while self.workers:
            self.workers.pop().end()

    def _start(self) -> Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs,))
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _collect(self, ranks: int, name: str, deadline: float) -> list[Any]:
        missing = {worker.connection: rank for rank, worker in enumerate(self.workers[:ranks])}
        results: list[Any] = [None] * ranks
        while missing:
            ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"{name} on {ranks} ranks: ranks {sorted(missing.values())} did not answer in time"
                )
            for connection in ready:
                assert isinstance(connection, Connection), f"unexpected object {connection} in the pool"
                rank = missing.pop(connection)
                try:
                    succeeded, results[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    raise RemoteError(f"{name}: rank {rank} of {ranks} died without a word") from None
                if not succeeded:
                    raise RemoteError(f"{name} failed on rank {rank} of {ranks}:\n{results[rank]}")
        return results


def serve(connection: Connection) -> None:
    """A worker's life: jobs until the session ends."""
    import torch

    torch.set_num_threads(1)
    # Every rank would repeat what megatron-core says of missing optional packages.
    warnings.simplefilter("ignore")
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        run_in_world(job, connection)


def run_in_world(job: Job, connection: Connection) -> None:
    """Join the world, run the function, answer, leave the world."""
    import torch.distributed as dist

    from megatron_iml.parallel.groups import stop_distributed

    try:
        # A file, not a port: nothing to collide with. The pool's own deadline comes before this timeout.
        store = dist.FileStore(job.store, job.world_size)
        timeout = timedelta(seconds=2 * job.timeout_seconds + 60)
        dist.init_process_group(
            "gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=timeout
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
