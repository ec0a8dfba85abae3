"""The pack plan on disk: which documents lie where in which row, for a whole run; no tokens.

    plan/manifest.json     what it was made from, its fingerprint, the ledger of every task
    plan/entries.npy       ENTRY [E], documents in the order in which they lie, row after row; mapped
    plan/row_starts.npy    int64 [R+1], first entry of every row
    plan/row_targets.npy   uint32 [R], targets of every row
    plan/row_pairs.npy     uint64 [R], visible (row, column) pairs of every row: its attention's FLOPs

Two rows of 8 slots holding documents of 6, 4 and 5 tokens (5 + 3 slots, 4 slots):

    entries     (document 7, cut 0, length 6), (document 2, length 4), (document 9, cut 3, length 5)
    row_starts  0 2 3
    row_pairs   5*6/2 + 3*4/2 = 21, 4*5/2 = 10

Suffixes: E entries, R rows.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.corpus import canonical_digest
from megatron_iml.data.manifest import MANIFEST, read_manifest

FORMAT_VERSION = 1
MANIFEST_KEYS = frozenset(
    {"format_version", "fingerprint", "origin", "num_rows", "num_entries", "bytes", "ledger"}
)
ENTRY = np.dtype(
    [
        ("document", "<u4"),
        ("cut", "<u4"),  # tokens lost from the left of the source
        ("reference", "<u2"),  # which of the document's targets
        ("length", "<u2"),  # tokens kept, source and target
        ("shared", "<u2"),  # tokens it has in common with its trunk and does not store
        ("trunk", "<i2"),  # entry of the row it hangs on, -1 none
    ]
)
ARRAYS = {"entries": ENTRY, "row_starts": "<i8", "row_targets": "<u4", "row_pairs": "<u8"}


@dataclass(frozen=True, slots=True, eq=False)
class PlanArrays:
    """The arrays of a plan: see the head of this module."""

    entries: NDArray[np.void]
    row_starts: NDArray[np.int64]
    row_targets: NDArray[np.uint32]
    row_pairs: NDArray[np.uint64]


class Plan:
    """A pack plan, mapped from disk."""

    def __init__(self, folder: Path, manifest: dict[str, Any], arrays: PlanArrays) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.corpus_fingerprint: str = manifest["origin"]["corpus_fingerprint"]
        self.row_length: int = manifest["origin"]["row_length"]
        self.max_positions: int = manifest["origin"]["max_positions"]
        self.num_rows: int = manifest["num_rows"]
        self.ledger: dict[str, dict[str, Any]] = manifest["ledger"]
        self.targets_R = arrays.row_targets
        self.pairs_R = arrays.row_pairs
        self._entries = arrays.entries
        self._row_starts = arrays.row_starts

    @classmethod
    def open(cls, folder: Path) -> "Plan":
        """Map a plan. Raises FileNotFoundError for what is absent, ValueError for what was cut or changed."""
        manifest = read_manifest(folder, "plan", FORMAT_VERSION, MANIFEST_KEYS, "build_plan.py")
        if plan_fingerprint(manifest["origin"]) != manifest["fingerprint"]:
            raise ValueError(
                f"{folder / MANIFEST} was changed after it was written: its fingerprint differs; "
                "rebuild it with tools/preprocess/build_plan.py"
            )
        arrays = PlanArrays(**{name: _map(folder, name, manifest["bytes"][name]) for name in ARRAYS})
        rows = manifest["num_rows"]
        assert len(arrays.row_starts) == rows + 1, f"{len(arrays.row_starts)} row starts for {rows} rows"
        assert len(arrays.row_targets) == len(arrays.row_pairs) == rows, f"row counts differ from {rows}"
        assert arrays.row_starts[-1] == len(arrays.entries), "the last row ends elsewhere than the entries"
        return cls(folder, manifest, arrays)

    def entries(self, row: int) -> NDArray[np.void]:
        """Return the entries of a row in the order in which they lie, ENTRY [documents of the row]."""
        assert 0 <= row < self.num_rows, f"row {row} of {self.num_rows}"
        return self._entries[self._row_starts[row] : self._row_starts[row + 1]]


def plan_fingerprint(origin: dict[str, Any]) -> str:
    """Return the digest of everything a plan follows from: corpus, mixture, row length, seed, algorithm..."""
    return canonical_digest(origin)


def _map(folder: Path, name: str, expected_bytes: int) -> NDArray:
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; rebuild the plan with tools/preprocess/build_plan.py")
    actual = path.stat().st_size
    if actual != expected_bytes:
        raise ValueError(
            f"{path} has {actual} bytes, expected {expected_bytes}; copy it again or rebuild it with "
            "tools/preprocess/build_plan.py"
        )
    # Mapped: the ranks of a node share one copy of the pages.
    array = np.load(path, mmap_mode="r")
    assert array.dtype == ARRAYS[name], f"{path} holds {array.dtype}, expected {ARRAYS[name]}"
    return np.asarray(array)


def write_plan(
    folder: Path, origin: dict[str, Any], arrays: PlanArrays, ledger: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Write a plan, whole or not at all, and return its manifest.

    Raises ValueError when the folder holds something that is no plan or a plan made from something else.
    """
    manifest_path = folder / MANIFEST
    fingerprint = plan_fingerprint(origin)
    if folder.exists() and any(folder.iterdir()) and not manifest_path.is_file():
        raise ValueError(f"{folder} exists and holds no plan; choose another output folder or remove it")
    if manifest_path.is_file():
        # Never over a bench or a corpus, whose manifests bear the same name.
        found = read_manifest(folder, "plan", FORMAT_VERSION, MANIFEST_KEYS, "build_plan.py")["fingerprint"]
        if found != fingerprint:
            raise ValueError(
                f"{folder} holds plan {found}, this one is {fingerprint}: made from another corpus, "
                "mixture, row length, number of rows or seed; remove it or choose another output folder"
            )
    # Beside its place, since a rename works on one file system only.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = {
        "entries": arrays.entries,
        "row_starts": arrays.row_starts,
        "row_targets": arrays.row_targets,
        "row_pairs": arrays.row_pairs,
    }
    for name in stored:
        np.save(partial / f"{name}.npy", stored[name])
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "origin": origin,
        "num_rows": len(arrays.row_targets),
        "num_entries": len(arrays.entries),
        "bytes": {name: (partial / f"{name}.npy").stat().st_size for name in ARRAYS},
        "ledger": ledger,
    }
    (partial / MANIFEST).write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    # A folder cannot be renamed over a full one; the new plan is whole before the old one goes.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return manifest
