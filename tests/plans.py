"""A loader over a plan and documents that exist in memory only."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_iml.data.plan.folder import ENTRY, Plan, PlanArrays
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.data.rows.layout import RowLayout


class MemoryLoader:
    """What `data.rows.loader.Loader` offers, without files."""

    def __init__(self, rows: Sequence[Sequence[Piece]], row_length: int) -> None:
        self.pieces = rows
        assembled = [assemble_row(pieces, row_length, index) for index, pieces in enumerate(rows)]
        lengths = [len(pieces) for pieces in rows]
        flat = [piece for pieces in rows for piece in pieces]
        entries = np.zeros(len(flat), dtype=ENTRY)
        entries["document"] = np.arange(len(flat))
        entries["length"] = [len(piece.tokens) for piece in flat]
        entries["shared"] = [piece.shared for piece in flat]
        entries["trunk"] = [piece.trunk for piece in flat]
        pairs = [int((row.layout.end_T - np.arange(row_length)).sum()) for row in assembled]
        arrays = PlanArrays(
            entries=entries,
            row_starts=np.concatenate([[0], np.cumsum(lengths)]),
            row_slots=np.array([row.layout.num_real for row in assembled], dtype=np.uint32),
            row_targets=np.array([row.layout.num_targets for row in assembled], dtype=np.uint32),
            row_pairs=np.array(pairs, dtype=np.uint64),
        )
        branches = max((sum(piece.trunk >= 0 for piece in row) for row in self.pieces), default=0)
        origin = {"corpus_fingerprint": "", "row_length": row_length, "max_positions": row_length}
        origin["branches"] = branches
        manifest = {"fingerprint": "memory", "origin": origin, "num_rows": len(rows), "ledger": {}}
        self.plan = Plan(Path(), manifest, arrays)

    def row(self, row: int) -> Row:
        return assemble_row(self.pieces[row], self.plan.row_length, row)

    def layout(self, row: int) -> RowLayout:
        return self.row(row).layout
