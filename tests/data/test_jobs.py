"""Parts of work: whose they are, records that count, and claims."""

import subprocess
import sys
from pathlib import Path

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
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_claim_holds_until_its_process_dies(tmp_path: Path) -> None:
    lock = tmp_path / "part.lock"
    command = [sys.executable, "-c", HOLDER, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="part is being written by another process"), claim(lock):
            pass
        holder.kill()
    with claim(lock):
        assert lock.exists()
    assert not lock.exists()
