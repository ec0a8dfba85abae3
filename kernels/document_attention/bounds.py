"""Who sees whom in a packed row, as one int32 per token, and which tiles of the mask there are to compute.

`end_T[col]` is one past the last row that may see column `col`: row sees col if and only if
`col <= row < end_T[col]`. For plain documents `end` is one past the document's last slot; for padding
`end_T[col] = col`, so that nobody sees it and it sees nobody. Documents that share a prefix lie depth first,
trunk before branches, and `end` is one past the last descendant:

    two documents of 3 and 2 slots, then padding       end_T = [3, 3, 3, 5, 5, 5]
    a trunk of 2 slots with branches of 2 and 1        end_T = [5, 5, 4, 4, 5]

The `TileSchedule` that kernels walk follows from `end`: for tiles of 2 x 2 slots, the trunk with its branches
has the column tiles

    rows 0-1: [0]      rows 2-3: [0, 1]      row 4: [0, 2]      the branch in tile 1 is over before row 4

T slots, Q query tiles, K key tiles, W = 2 Q turns of the backward, P tall query tiles, of twice as many rows;
their K is rounded up to whole tall tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_TILE = 64
"""Rows of the schedule's tiles; tall ones have twice as many."""
SHORT_KEY_TILE, LONG_KEY_TILE = 32, 64
"""Columns of the schedule's tiles: for short documents, where narrow tiles hold less that nobody sees, and
for long ones, where wide tiles are read and multiplied faster."""
KEYS_LATER = 2
"""Tiles between the last one that sees a tile of keys and the turn of those keys: enough that they rarely
wait, few enough that their inputs are still in the cache."""
LONG_DOCUMENTS = 500
"""Visible pairs a slot from which on a row counts as one of long documents; documents of 2,048 have 1,024."""


@dataclass(frozen=True)
class TileSchedule:
    """The tiles of the mask that hold something visible. Tensors are int32, on the device of `end`."""

    columns: int
    """Width of a key tile."""
    key_tiles_QK: Tensor
    """For each query tile the key tiles to visit, ascending, as 2 * tile + (1 if some pair is masked). The
    tiles on the diagonal come last and always; what follows them is unspecified."""
    num_key_tiles_Q: Tensor
    """How many of them there are."""
    tall_key_tiles_PK: Tensor
    """The same for tall query tiles, which read key tiles half as often; empty unless key tiles are wide."""
    num_tall_key_tiles_P: Tensor
    """How many of them there are."""
    stop_Q: Tensor
    """Of the slots of tile q as columns: one past the last row that sees any of them."""
    common_stop_Q: Tensor
    """Likewise: one past the last row that sees all of them (0 in a tile that the row's end cuts)."""
    backward_order_W: Tensor
    """The turns of the backward: below Q the gradients of that tile's queries, from Q on of tile turn - Q's
    keys. A tile of keys has its turn KEYS_LATER tiles after the last that sees it, whose delta it needs."""

    @classmethod
    def from_end(cls, end_T: Tensor, rows: int = QUERY_TILE, columns: int = SHORT_KEY_TILE) -> "TileSchedule":
        """Compute the schedule with a few torch operations and no host synchronisation.

        Args:
            end_T: int32 [T], T at most: tiles beyond the row never have their turn, and whoever waited for
                them would wait for ever.
            rows, columns: size of a tile; rows must be a multiple of columns. Memory: 4 bytes per tile of the
                T x T square, 2 MiB at 32,768 slots. As many columns as rows mean long documents: then the
                key tiles of tall query tiles are listed as well, in half as much memory.
        """
        key_tiles_QK, num_key_tiles_Q = _key_tiles(end_T, rows, columns)
        tall_rows_T = end_T if columns == rows else end_T[:0]
        tall_key_tiles_PK, num_tall_key_tiles_P = _key_tiles(tall_rows_T, 2 * rows, columns)
        ends_QR = _padded(end_T, rows).view(-1, rows)
        stop_Q, tile_Q = ends_QR.amax(1), torch.arange(ends_QR.shape[0], device=end_T.device)
        last_tile_Q = torch.maximum((stop_Q - 1) // rows, tile_Q)
        # Odd numbers: behind the queries of that tile.
        turns_W = torch.cat([2 * tile_Q, 2 * (last_tile_Q + KEYS_LATER) + 1])
        return cls(
            columns=columns,
            key_tiles_QK=key_tiles_QK,
            num_key_tiles_Q=num_key_tiles_Q,
            tall_key_tiles_PK=tall_key_tiles_PK,
            num_tall_key_tiles_P=num_tall_key_tiles_P,
            stop_Q=stop_Q,
            common_stop_Q=ends_QR.amin(1),
            backward_order_W=torch.argsort(turns_W, stable=True).int(),
        )

    def tensors(self) -> list[Tensor]:
        """All but `columns`, in order: `TileSchedule(columns, *schedule.tensors())` is the schedule again."""
        # Operators of torch take lists of tensors, not dataclasses.
        lists = [self.key_tiles_QK, self.num_key_tiles_Q, self.tall_key_tiles_PK, self.num_tall_key_tiles_P]
        return [*lists, self.stop_Q, self.common_stop_Q, self.backward_order_W]


def whole_tiles(tokens: int) -> int:
    """Slots of the query tiles that hold `tokens` slots."""
    return (tokens + QUERY_TILE - 1) // QUERY_TILE * QUERY_TILE


def _padded(end_T: Tensor, rows: int) -> Tensor:
    # Columns beyond the row end at 0: nobody sees them, and the last tile counts as masked.
    return torch.nn.functional.pad(end_T, (0, -end_T.numel() % rows))


def _key_tiles(end_T: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The list [Q, K] of key tiles of each query tile of `rows` rows, and how long it is, [Q]; int32."""
    assert rows % columns == 0, f"query tiles of {rows} rows are no multiple of {columns} columns"
    ends_KC = _padded(end_T, rows).view(-1, columns)
    first_row_Q1 = torch.arange(0, end_T.numel(), rows, device=end_T.device)[:, None]
    tile_K = torch.arange(ends_KC.shape[0], device=end_T.device)
    # All of a query tile's own slots as columns: one tile, or rows // columns of them.
    on_diagonal_QK = tile_K // (rows // columns) == first_row_Q1 // rows
    sees_QK = (ends_KC.amax(1) > first_row_Q1) & (tile_K * columns < first_row_Q1) | on_diagonal_QK
    masked_QK = (ends_KC.amin(1) < first_row_Q1 + rows) | on_diagonal_QK
    # Stable: tiles with something to see move to the front and stay ascending.
    order_QK = torch.argsort(sees_QK, dim=1, descending=True, stable=True)
    return (2 * order_QK + masked_QK.gather(1, order_QK)).int(), sees_QK.sum(1).int()


@dataclass(frozen=True)
class DocumentBounds:
    """Bounds of one row on one device: `end_T`, int32 [tokens], decides; the schedule only saves work.

    Both are made once and serve every layer.
    """

    end_T: Tensor
    schedule: TileSchedule

    @classmethod
    def from_end(cls, end_T: Tensor, pairs: int | None = None) -> "DocumentBounds":
        """Bounds of a row, with the tiles that there are to compute.

        Args:
            end_T: int32 [T]; beyond T it means T.
            pairs: the sum of end - column, if the host knows it; the device is not asked. It decides how wide
                the schedule's tiles are, and so the order of sums, but nothing else.
        """
        # What a kernel computes beyond the row is anything, so that nobody may see.
        end_T = end_T.clamp(max=end_T.numel())
        # A slot of a document of L has (L + 1) / 2 pairs on average.
        has_long_documents = pairs is not None and pairs > LONG_DOCUMENTS * end_T.numel()
        columns = LONG_KEY_TILE if has_long_documents else SHORT_KEY_TILE
        return cls(end_T=end_T, schedule=TileSchedule.from_end(end_T, columns=columns))
