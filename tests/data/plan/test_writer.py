"""Writing plans: whatever comes in pieces is one .npy file, and its header fits numbers of any size."""

import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from megatron_iml.data.plan.folder import ENTRY, Plan
from megatron_iml.data.plan.writer import PackedRows, PlanWriter, finished_plan

ORIGIN = {"corpus_fingerprint": "c", "row_length": 8, "max_positions": 8, "branches": 0}


def rows(*documents: int) -> PackedRows:
    """One row of two such documents each."""
    entries = np.zeros(2 * len(documents), dtype=ENTRY)
    entries["document"] = np.repeat(documents, 2)
    count = np.full(len(documents), 2)
    return PackedRows(entries, count, 3 * count, count + 5, 1 << 40 << count)


def test_pieces_become_one_plan(tmp_path: Path) -> None:
    writer = PlanWriter(tmp_path / "plan", ORIGIN)
    for piece in (rows(7), rows(), rows(*range(1000)), rows(9)):
        writer.append(piece)
    assert not (tmp_path / "plan").exists()
    manifest = writer.close({"task": {"drawn": 2004}})
    assert (manifest["num_rows"], manifest["num_entries"]) == (1002, 2004)
    plan = Plan.open(tmp_path / "plan")
    # Whole groups of four go ahead of the rows that wait for company, which here never comes.
    assert [plan.entries(row)["document"].tolist() for row in (0, 1, 999, 1000, 1001)] == [
        [0, 0],
        [1, 1],
        [999, 999],
        [7, 7],
        [9, 9],
    ]
    assert plan.row_starts.tolist() == list(range(0, 2005, 2))
    assert (set(plan.slots_R.tolist()), set(plan.targets_R.tolist())) == ({6}, {7})
    assert set(plan.pairs_R.tolist()) == {1 << 42}
    assert plan.ledger == {"task": {"drawn": 2004}}
    for name, record in manifest["files"].items():
        data = (tmp_path / "plan" / f"{name}.npy").read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (record["bytes"], record["sha256"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan"]


def test_rows_left_over_become_groups(tmp_path: Path) -> None:
    with PlanWriter(tmp_path / "plan", ORIGIN) as writer:
        for piece in (rows(0, 1, 2, 3, 100), rows(4, 5, 6, 7, 101, 102, 103), rows(8, 9, 10, 11, 104)):
            writer.append(piece)
        assert writer.num_rows == 17
        writer.close({})
    documents = Plan.open(tmp_path / "plan").entries_E["document"][::2]
    assert documents.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 100, 101, 102, 103, 8, 9, 10, 11, 104]


def test_an_empty_folder_is_filled_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert finished_plan(tmp_path / "empty", "any") is None
    writer = PlanWriter(tmp_path / "empty", ORIGIN)
    writer.append(rows(1))
    fingerprint = writer.close({})["fingerprint"]
    assert finished_plan(tmp_path / "empty", fingerprint) == Plan.open(tmp_path / "empty").manifest
    (tmp_path / "file").write_text("notes")
    with pytest.raises(ValueError, match="file exists and holds no plan; choose another output folder"):
        finished_plan(tmp_path / "file", "any")


def test_every_file_is_on_disk_before_the_plan_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    with PlanWriter(tmp_path / "plan", ORIGIN) as writer:
        writer.append(rows(7))
        writer.close({})
    # The manifest too: a plan whose manifest is empty blocks would neither open nor be built again.
    assert {path.stat().st_ino for path in (tmp_path / "plan").iterdir()} == synced
