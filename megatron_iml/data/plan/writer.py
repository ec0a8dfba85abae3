"""Writes a plan as a stream: packed windows enter one after another, a folder that is whole or absent leaves.

    with PlanWriter(Path("plan"), origin) as writer:     plan/ untouched; .plan.partial/ begins
        writer.append(window)                            its rows go to the ends of five files
        writer.close(ledger)                             manifest, one rename: .plan.partial/ -> plan/

Rows come in groups that belong together (balance.py); a window's last rows, too few for a group, wait for
those of other windows, so that a group always begins at a multiple of its size.

A build that was killed leaves .plan.partial/, which the next one of that name clears away: a plan of 18
million documents takes about a minute, so nothing of it is kept.

Suffixes: R rows of a window.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.jobs import write_json
from megatron_iml.data.manifest import MANIFEST, read_manifest
from megatron_iml.data.plan.balance import GROUP_ROWS
from megatron_iml.data.plan.folder import ARRAYS, ENTRY, FORMAT_VERSION, MANIFEST_KEYS, Plan, plan_fingerprint


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Rows in their order: entries end to end, and documents, slots, targets and visible pairs of each."""

    entries: NDArray[np.void]
    counts_R: NDArray[np.int64]
    slots_R: NDArray[np.int64]
    targets_R: NDArray[np.int64]
    pairs_R: NDArray[np.int64]

    def cut_groups(self) -> "tuple[PackedRows, PackedRows]":
        """Return the rows that make up whole groups, and those after them."""
        rows = len(self.counts_R) // GROUP_ROWS * GROUP_ROWS
        entries = int(self.counts_R[:rows].sum())
        sums = (self.counts_R, self.slots_R, self.targets_R, self.pairs_R)
        return (
            PackedRows(self.entries[:entries], *(values_R[:rows] for values_R in sums)),
            PackedRows(self.entries[entries:], *(values_R[rows:] for values_R in sums)),
        )

    def join(self, other: "PackedRows") -> "PackedRows":
        """Return these rows and the other ones after them."""
        return PackedRows(
            np.concatenate((self.entries, other.entries)),
            np.concatenate((self.counts_R, other.counts_R)),
            np.concatenate((self.slots_R, other.slots_R)),
            np.concatenate((self.targets_R, other.targets_R)),
            np.concatenate((self.pairs_R, other.pairs_R)),
        )


class _ArrayFile:
    """A one-dimensional .npy file that grows; its header gets the number of elements at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype, self._count = path, dtype, 0
        self._file = path.open("wb")
        self._write_header()
        self._data_starts = self._file.tell()

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, self._dtype))
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self._count,)})

    def append(self, values: NDArray) -> None:
        """Write values behind those that are there."""
        self._file.write(values.astype(self._dtype).tobytes())
        self._count += len(values)

    def close(self) -> dict[str, Any]:
        """Put the final count into the header."""
        self._file.seek(0)
        self._write_header()
        # numpy leaves room for the number to grow to 21 digits; without it data would be overwritten.
        assert self._file.tell() == self._data_starts, f"the header of {self._path} changed its length"
        self._file.flush()
        # The rename comes next: a crash must not leave a full name on empty blocks.
        os.fsync(self._file.fileno())
        self._file.close()
        # From the start again: the header came last, so no digest could be kept while writing.
        with self._path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        return {"bytes": self._path.stat().st_size, "sha256": digest}


def finished_plan(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest of the plan that is asked for, if it lies there whole, None if nothing does.

    Raises ValueError when the folder holds something that is no plan, or another plan.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and holds no plan; choose another output folder or remove it")
    # Never over a bench or a corpus, whose manifests bear the same name.
    found = read_manifest(folder, "plan", FORMAT_VERSION, MANIFEST_KEYS, "build_plan.py")["fingerprint"]
    if found != fingerprint:
        raise ValueError(
            f"{folder} holds plan {found}, this one is {fingerprint}: made from another corpus, "
            "mixture, row length, number of rows or seed; remove it or choose another output folder"
        )
    # Opened, not believed: files that were cut since must not pass for a finished plan.
    return Plan.open(folder).manifest


class PlanWriter:
    """Streams the rows of one plan into a folder that appears when the last one is written."""

    def __init__(self, folder: Path, origin: dict[str, Any]) -> None:
        self._folder, self._origin = folder, origin
        # Beside its place, since a rename works on one file system only.
        self._partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = {
            name: _ArrayFile(self._partial / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()
        }
        # Starts are one more than rows: `_write` adds the stop of each.
        self._files["row_starts"].append(np.zeros(1, dtype=np.int64))
        self.num_rows = self.num_entries = 0
        none = np.zeros(0, dtype=np.int64)
        self._loose = PackedRows(np.zeros(0, dtype=ENTRY), none, none, none, none)

    def __enter__(self) -> "PlanWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # Gone already, unless the plan was not closed.
        shutil.rmtree(self._partial, ignore_errors=True)

    def append(self, rows: PackedRows) -> None:
        """Take rows; those beyond whole groups are written later, as groups of such rows or at the end."""
        self.num_rows += len(rows.counts_R)
        groups, loose = rows.cut_groups()
        self._write(groups)
        # Rows left over are near the mean of their window (balance.py): any four of them are a good group.
        groups, self._loose = self._loose.join(loose).cut_groups()
        self._write(groups)

    def _write(self, rows: PackedRows) -> None:
        stops_R = self.num_entries + np.cumsum(rows.counts_R)
        for name, values in (
            ("entries", rows.entries),
            ("row_starts", stops_R),
            ("row_slots", rows.slots_R),
            ("row_targets", rows.targets_R),
            ("row_pairs", rows.pairs_R),
        ):
            self._files[name].append(values)
        self.num_entries += len(rows.entries)

    def close(self, ledger: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write the rows that waited and the manifest, move the folder to its place, return the manifest."""
        self._write(self._loose)
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": plan_fingerprint(self._origin),
            "origin": self._origin,
            "num_rows": self.num_rows,
            "num_entries": self.num_entries,
            "files": {name: file.close() for name, file in self._files.items()},
            "ledger": ledger,
        }
        write_json(self._partial / MANIFEST, manifest)
        # An empty folder may stand there, which finished_plan allows and a rename replaces.
        self._partial.rename(self._folder)
        return manifest
