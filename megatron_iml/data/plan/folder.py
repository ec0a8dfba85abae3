"""The pack plan on disk: which documents lie where in which row, for a whole run; no tokens.

    plan/manifest.json     what it was made from, its fingerprint, the ledger of every task
    plan/entries.npy       ENTRY [E], documents in the order in which they lie, row after row; mapped
    plan/row_starts.npy    int64 [R+1], first entry of every row
    plan/row_slots.npy     uint32 [R], slots of every row that hold a token
    plan/row_targets.npy   uint32 [R], targets of every row
    plan/row_pairs.npy     uint64 [R], visible (row, column) pairs of every row: its attention's FLOPs

Two rows of 8 slots holding documents of 6, 4 and 5 tokens (5 + 3 slots, 4 slots):

    entries     (document 7, cut 0, length 6), (document 2, length 4), (document 9, cut 3, length 5)
    row_starts  0 2 3
    row_slots   8 4
    row_pairs   5*6/2 + 3*4/2 = 21, 4*5/2 = 10

Opening maps the arrays and reads none, so that it costs the same for every size; build.py writes them.

Suffixes: E entries, R rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus.folder import canonical_digest
from megatron_iml.data.manifest import MANIFEST, read_manifest

FORMAT_VERSION = 2
MANIFEST_KEYS = frozenset(
    {"format_version", "fingerprint", "origin", "num_rows", "num_entries", "files", "ledger"}
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
ARRAYS: dict[str, np.dtype] = {
    "entries": ENTRY,
    "row_starts": np.dtype("<i8"),
    "row_slots": np.dtype("<u4"),
    "row_targets": np.dtype("<u4"),
    "row_pairs": np.dtype("<u8"),
}


@dataclass(frozen=True, slots=True, eq=False)
class PlanArrays:
    """The arrays of a plan: see the head of this module."""

    entries: NDArray[np.void]
    row_starts: NDArray[np.int64]
    row_slots: NDArray[np.uint32]
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
        self.shares_prefixes: bool = manifest["origin"]["branches"] > 0
        self.num_rows: int = manifest["num_rows"]
        self.ledger: dict[str, dict[str, Any]] = manifest["ledger"]
        self.slots_R = arrays.row_slots
        self.targets_R = arrays.row_targets
        self.pairs_R = arrays.row_pairs
        self.entries_E = arrays.entries
        self.row_starts = arrays.row_starts

    @classmethod
    def open(cls, folder: Path) -> "Plan":
        """Map a plan. Raises FileNotFoundError for what is absent, ValueError for what was cut or changed."""
        manifest = read_manifest(folder, "plan", FORMAT_VERSION, MANIFEST_KEYS, "build_plan.py")
        if plan_fingerprint(manifest["origin"]) != manifest["fingerprint"]:
            raise ValueError(
                f"{folder / MANIFEST} was changed after it was written: its fingerprint differs; "
                f"{_rebuild(folder)}"
            )
        arrays = PlanArrays(**{name: _map(folder, name, manifest["files"][name]["bytes"]) for name in ARRAYS})
        # Asserts: the files have their sizes, so what disagrees here was written wrongly.
        rows = manifest["num_rows"]
        assert len(arrays.row_starts) == rows + 1, f"{len(arrays.row_starts)} row starts for {rows} rows"
        for sums in (arrays.row_slots, arrays.row_targets, arrays.row_pairs):
            assert len(sums) == rows, f"{len(sums)} sums for {rows} rows"
        assert arrays.row_starts[-1] == len(arrays.entries), "the last row ends elsewhere than the entries"
        return cls(folder, manifest, arrays)

    def entries(self, row: int) -> NDArray[np.void]:
        """Return the entries of a row in the order in which they lie, ENTRY [documents of the row]."""
        assert 0 <= row < self.num_rows, f"row {row} of {self.num_rows}"
        return self.entries_E[self.row_starts[row] : self.row_starts[row + 1]]


def plan_fingerprint(origin: dict[str, Any]) -> str:
    """Return the digest of everything a plan follows from: corpus, mixture, row length, seed, algorithm..."""
    return canonical_digest(origin)


def _map(folder: Path, name: str, expected_bytes: int) -> NDArray:
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_rebuild(folder)}")
    actual = path.stat().st_size
    if actual != expected_bytes:
        raise ValueError(
            f"{path} has {actual} bytes, expected {expected_bytes}; copy it again or {_rebuild(folder)}"
        )
    # Mapped: the ranks of a node share one copy of the pages.
    array = np.load(path, mmap_mode="r")
    assert array.dtype == ARRAYS[name], f"{path} holds {array.dtype}, expected {ARRAYS[name]}"
    # Not as np.memmap, whose indexing costs microseconds an element.
    return np.asarray(array)


def _rebuild(folder: Path) -> str:
    # A finished plan is not built a second time while its manifest stands.
    return f"remove {folder} and build it anew with tools/preprocess/build_plan.py"
