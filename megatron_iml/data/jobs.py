"""How long work is shared and taken up again: parts with records, processes, and jobs of a SLURM array.

Work is cut into numbered parts (tasks of a bench, shards of a corpus). A finished part has a record beside
it, written last; whoever comes later and finds it, goes on. A job does the parts that are its own:

    parts 0 .. 6, Job(index=1, count=3)  ->  1, 4          Job(0, 1), the whole  ->  0 .. 6

The jobs of an array leave records; one run of the whole afterwards finds all of them and finishes. What two
processes would write at once is claimed first, so that a run started too early, or twice, stops and breaks
nothing: a run of the whole holds its output folder alone, jobs of an array share it and hold their parts.
"""

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron_iml.data.files import write_atomically


@dataclass(frozen=True, slots=True)
class Job:
    """One of `count` jobs that share the parts of some work."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"job index {self.index} of {self.count} jobs; give --job-index from 0 to {self.count - 1} "
                "(a SLURM array: --array=0-N)"
            )

    @property
    def is_share(self) -> bool:
        """Whether other jobs do the other parts."""
        return self.count > 1

    def owns(self, part: int) -> bool:
        """Whether a part is this job's."""
        return part % self.count == self.index


WHOLE = Job()


def write_json(path: Path, value: object) -> None:
    """Write a file that is either whole or absent."""
    write_atomically(path, orjson.dumps(value, option=orjson.OPT_INDENT_2))


def finished_record(path: Path, origin: object) -> dict[str, Any] | None:
    """The record of a part that was finished from the same inputs."""
    if not path.is_file():
        return None
    record = orjson.loads(path.read_bytes())
    # Of other inputs: the part is done anew, and the record with it.
    return dict(record) if record["origin"] == origin else None


@contextmanager
def claim(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold `path` against other processes, by a lock file beside it: alone, or with others who share it.

    The kernel gives the lock up for a process that dies. Raises ValueError if another process holds it.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it: what is claimed may be a folder that is renamed or replaced meanwhile.
    lock = path.with_name(f".{path.name}.lock")
    with _locked(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX) as file:
        if file is None:
            raise ValueError(f"{path} is being written by another process; wait for it to end, or end it")
        try:
            yield
        finally:
            # By the last one to go: a file that others hold must not make room for another of its name.
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.unlink()


@contextmanager
def _locked(lock: Path, kind: int) -> Iterator[BinaryIO | None]:
    """The lock file, opened and locked; None if it is another's."""
    while True:
        # To append: created where it is absent, and never emptied.
        with lock.open("ab") as file:
            try:
                # Not lockf, whose locks are the process's: two claims of one process would both hold.
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Its holder may have removed it between opening and locking: then the name is another file's.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    yield file
                    return


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that end when this one does, however it ends; none for one worker."""
    # In this process: a spawned one would first import everything anew.
    if workers == 1:
        yield None
        return
    # Not forked: a fork would copy gigatoken's threads half-alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _die_with_parent)
    try:
        yield pool
    finally:
        # After an error too: workers would go on with work that nobody waits for.
        pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker when its parent is gone; one killed outright cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker follows a parent"

    def wait() -> None:
        parent.join()
        # Not sys.exit, which would end this thread alone.
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
