"""The tile schedule against its definition, and the tree of the module's head."""

import pytest
import torch
from forests import random_end

from megatron_iml.kernels.document_attention import DocumentBounds
from megatron_iml.kernels.document_attention.bounds import LONG_DOCUMENTS, TileSchedule


def seen(end_T: torch.Tensor) -> torch.Tensor:
    """bool [T, T]: row sees column."""
    index_T = torch.arange(end_T.numel())
    return (index_T <= index_T[:, None]) & (index_T[:, None] < end_T)


# Tall tiles are listed where key tiles are as wide as query tiles.
@pytest.mark.parametrize(("columns", "tall"), [(2, False), (4, False), (4, True)])
def test_the_schedule_lists_what_is_seen_and_says_what_needs_a_mask(columns: int, tall: bool) -> None:
    for seed in range(200):
        end_T = random_end(seed)
        # Tiles far smaller than the kernels', so that rows of 60 slots have many, cut anywhere.
        sees_TT, schedule = seen(end_T), TileSchedule.from_end(end_T, 4, columns)
        rows, lists, counts = 4, schedule.key_tiles_QK, schedule.num_key_tiles_Q
        if tall:
            rows, lists, counts = 8, schedule.tall_key_tiles_PK, schedule.num_tall_key_tiles_P
        assert counts.numel() == -(-end_T.numel() // rows)
        for tile, count in enumerate(counts.tolist()):
            entries = lists[tile, :count].tolist()
            listed = [entry >> 1 for entry in entries]
            assert listed == sorted(set(listed))
            block = sees_TT[tile * rows : (tile + 1) * rows]
            parts = {key: block[:, key * columns : (key + 1) * columns] for key in listed}
            # All visible pairs of these rows lie in the listed tiles.
            assert sum(int(part.sum()) for part in parts.values()) == int(block.sum()), f"seed {seed}"
            for entry in entries:
                part, is_diagonal = parts[entry >> 1], (entry >> 1) * columns // rows == tile
                # All pairs visible, no slot beyond the row. More masks or tiles would be right, and slow.
                is_whole = bool(part.all()) and part.shape == (rows, columns)
                assert bool(entry & 1) == (is_diagonal or not is_whole), f"seed {seed}"
                assert is_diagonal or part.any(), f"seed {seed}: nobody sees anything in tile {entry >> 1}"


def test_keys_have_their_turn_after_all_rows_that_see_them() -> None:
    rows = 4
    for seed in range(200):
        end_T = random_end(seed)
        sees_TT, schedule = seen(end_T), TileSchedule.from_end(end_T, rows, 2)
        order, tiles = schedule.backward_order_W.tolist(), schedule.num_key_tiles_Q.numel()
        assert sorted(order) == list(range(2 * tiles))
        # Waiting ends because whoever is waited for has an earlier turn: a later one could hang a GPU.
        turn = {work: place for place, work in enumerate(order)}
        for keys in range(tiles):
            seeing_T = sees_TT[:, keys * rows : (keys + 1) * rows].any(1).nonzero()[:, 0]
            waited_for = {keys, *(seeing_T // rows).tolist(), (int(schedule.stop_Q[keys]) - 1) // rows}
            late = [tile for tile in waited_for if tile >= keys and turn[tile] > turn[tiles + keys]]
            assert not late, f"seed {seed}: keys {keys} wait for rows {late}, whose turn is later"


def test_wide_tiles_for_long_documents_only() -> None:
    # The width is the host's choice, from what it knows of the row: `end` itself is on the device.
    end_T = torch.full((8,), 8, dtype=torch.int32)
    pairs = 8 * LONG_DOCUMENTS
    widths = [DocumentBounds.from_end(end_T, n).schedule.columns for n in (None, pairs, pairs + 1)]
    assert widths == [32, 32, 64]


def test_the_tree_of_the_modules_head() -> None:
    schedule = TileSchedule.from_end(torch.tensor([5, 5, 4, 4, 5], dtype=torch.int32), 2, 2)
    counts = schedule.num_key_tiles_Q.tolist()
    tiles = [
        [entry >> 1 for entry in row[:n]]
        for row, n in zip(schedule.key_tiles_QK.tolist(), counts, strict=True)
    ]
    assert tiles == [[0], [0, 1], [0, 2]]


def test_an_end_beyond_the_row_is_the_rows() -> None:
    within, beyond = (torch.full((70,), end, dtype=torch.int32) for end in (70, 200))
    one, other = (DocumentBounds.from_end(end_T) for end_T in (within, beyond))
    # Keys would else wait for tiles of rows that do not exist, and see what is computed beyond the row.
    assert torch.equal(one.end_T, other.end_T)
    pairs = zip(one.schedule.tensors(), other.schedule.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
