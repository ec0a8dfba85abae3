"""Parts of work: whose they are, records that count, and claims."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_iml.data.jobs import WHOLE, Job, claim, finished_record, write_json


def test_every_part_has_one_job() -> None:
    owners = [[part for part in range(7) if Job(index, 3).owns(part)] for index in range(3)]
    assert owners == [[0, 3, 6], [1, 4], [2, 5]]
    assert all(WHOLE.owns(part) for part in range(7)) and not WHOLE.is_share


def test_a_job_outside_the_array_is_refused() -> None:
    with pytest.raises(ValueError, match="job index 3 of 3 jobs; give --job-index from 0 to 2"):
        Job(3, 3)


def test_a_record_counts_only_for_the_inputs_it_was_made_from(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    assert finished_record(path, {"seed": 1}) is None
    write_json(path, {"origin": {"seed": 1}, "rows": 5})
    assert finished_record(path, {"seed": 1}) == {"origin": {"seed": 1}, "rows": 5}
    assert finished_record(path, {"seed": 2}) is None
    assert [file.name for file in tmp_path.iterdir()] == ["part.json"]


HOLDER = """
import sys
from pathlib import Path
from megatron_iml.data.jobs import claim
with claim(Path(sys.argv[1]), shared=len(sys.argv) > 2):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path, *shared: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the path, killed at the end."""
    command = [sys.executable, "-c", HOLDER, path, *shared]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder
        holder.kill()


def test_a_claim_holds_until_its_process_dies(tmp_path: Path) -> None:
    path, lock = tmp_path / "part", tmp_path / ".part.lock"
    with held(path), pytest.raises(ValueError, match="part is being written by another process"), claim(path):
        pass
    with claim(path):
        assert lock.exists()
    assert not lock.exists()


def test_jobs_share_a_claim_and_the_whole_does_not(tmp_path: Path) -> None:
    path, lock = tmp_path / "bench", tmp_path / ".bench.lock"
    with held(path, "shared"):
        with claim(path, shared=True):
            pass
        # The other job still holds the file that the first one left.
        assert lock.exists()
        with pytest.raises(ValueError, match="bench is being written by another process"), claim(path):
            pass
    with held(path), pytest.raises(ValueError, match="being written"), claim(path, shared=True):
        pass
    with claim(path, shared=True), claim(path, shared=True):
        pass
    assert not lock.exists()


def test_a_lock_file_that_its_holder_removed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opened before the holder removed it, locked after: without a second look two would hold two files.
    path, lock = tmp_path / "bench", tmp_path / ".bench.lock"
    flock = fcntl.flock
    removed = []

    def remove_first(file: BinaryIO, kind: int) -> None:
        if not removed:
            removed.append(lock.unlink())
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with claim(path):
        with pytest.raises(ValueError, match="being written"), claim(path):
            pass
        assert lock.exists()
