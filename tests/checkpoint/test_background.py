"""The process that writes: what it leaves, and that it ends with the run it writes for."""

import gc
import io
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_iml.checkpoint.background import Bucket, Outcome, write_files
from megatron_iml.checkpoint.record import describe_file
from megatron_iml.data.files import HashingFile

FORK = multiprocessing.get_context("fork")


def fork(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    """As megatron-core forks: collecting what other tests have left, such as groups, can crash the child."""
    process = FORK.Process(target=target, args=arguments)
    gc.disable()
    try:
        process.start()
    finally:
        gc.enable()
    return process


def bucket(folder: Path, *tensors: torch.Tensor) -> Bucket:
    items = [
        (WriteItem(MetadataIndex(f"t{number}"), WriteItemType.TENSOR), tensor)
        for number, tensor in enumerate(tensors)
    ]
    return str(folder / "weights_00000.distcp"), "weights_00000.distcp", ([], items)


def test_a_file_can_be_read_back_and_is_described(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    outcome = Outcome()
    outcome.gate.open()
    fork(write_files, 0, [bucket(tmp_path, whole, whole[10:20])], outcome).join()
    results, files, error = outcome.hear()
    path = tmp_path / "weights_00000.distcp"
    assert error is None and files == {path.name: describe_file(path)}
    for result, expected in zip(results, (whole, whole[10:20]), strict=True):
        place = result.storage_data
        archive = path.read_bytes()[place.offset : place.offset + place.length]
        assert torch.equal(torch.load(io.BytesIO(archive)), expected)
    # The second is a view of the first: only what it shows is written.
    assert results[1].size_in_bytes < results[0].size_in_bytes - 300


def test_it_writes_although_the_run_computes_with_threads(tmp_path: Path) -> None:
    whole = torch.zeros(1 << 20)
    outcome = Outcome()
    outcome.gate.open()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole.clone()  # large enough to be shared out among OpenMP's threads, which a fork has not
        process = fork(write_files, 0, [bucket(tmp_path, whole[: 1 << 19])], outcome)
        # A view, so that the writing process copies it.
        process.join(timeout=60)
        assert process.exitcode == 0, "the process that writes waits for threads that it does not have"
    finally:
        torch.set_num_threads(before)
        process.kill()
    assert outcome.hear()[2] is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_the_disk_refuses_is_told(tmp_path: Path, asynchronous: bool) -> None:
    outcome = Outcome()
    outcome.gate.open()
    arguments = (0, [bucket(tmp_path / "nowhere", torch.zeros(1))], outcome)
    if asynchronous:
        fork(write_files, *arguments).join()
    else:
        write_files(*arguments)
    results, files, error = outcome.hear()
    assert (results, files) == ([], {})
    assert error is not None and error.startswith("weights_00000.distcp: [Errno 2] No such file or directory")


@pytest.mark.parametrize("half_told", [b"", pickle.dumps(([], {}, None))[:-3]])
def test_a_writer_that_died_is_an_error(half_told: bytes) -> None:
    outcome = Outcome()
    outcome.file.write(half_told)
    assert outcome.hear() == ([], {}, "the process that writes was killed")


def write_slowly(folder: Path) -> None:
    """A run whose disk takes a quarter of a second for every tensor: 30 seconds in all."""
    write = HashingFile.write

    def slow_write(self: HashingFile, data: bytes) -> int:
        time.sleep(0.05)
        return write(self, data)

    HashingFile.write = slow_write  # type: ignore[method-assign]
    buckets = [bucket(folder, *[torch.zeros(4)] * 120)]
    outcome = Outcome()
    outcome.gate.open()
    writer = fork(write_files, 0, buckets, outcome)
    (folder / "pid").write_text(str(writer.pid))
    os.kill(os.getpid(), 9)


def test_it_ends_with_its_run(tmp_path: Path) -> None:
    fork(write_slowly, tmp_path).join()
    writer = int((tmp_path / "pid").read_text())
    began = time.monotonic()
    while psutil.pid_exists(writer) and time.monotonic() < began + 20:
        time.sleep(0.05)
    assert not psutil.pid_exists(writer)
