"""Which rows a rank reads in a step, and the totals that every rank knows without reading."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import tiny_config
from plans import MemoryLoader

from megatron_iml.data.rows.assemble import Piece, Row
from megatron_iml.data.rows.layout import RowLayout
from megatron_iml.parallel.groups import Layout
from megatron_iml.training.flops import row_flops
from megatron_iml.training.rows import StepRows, empty_row, step_rows

CONFIG = tiny_config()


def layout(
    data: int = 0, data_size: int = 1, pipeline: int = 0, pipeline_size: int = 1, virtual: int = 1
) -> Layout:
    cpu = torch.device("cpu")
    return Layout(0, 8, 0, 1, pipeline, pipeline_size, virtual, data, data_size, cpu, None)


def document(length: int, source: int = 1, trunk: int = -1, shared: int = 0) -> Piece:
    return Piece(np.arange(4, 4 + length, dtype=np.int32), source, trunk, shared)


@pytest.fixture(scope="module")
def loader() -> MemoryLoader:
    rows = [
        [document(9, 5), document(4)],
        [document(17)],
        [document(3), document(3), document(3)],
        [document(8, 4), document(10, 6, trunk=0, shared=6)],
        [document(12, 11)],
    ]
    return MemoryLoader(rows, row_length=16)


def indices(rows: StepRows) -> list[int]:
    return [row.layout.index if isinstance(row, Row) else row.index for row in rows.rows]


def test_totals_by_hand(loader: MemoryLoader) -> None:
    rows = step_rows(loader, range(0, 4), CONFIG, layout())
    assert indices(rows) == [0, 1, 2, 3]
    assert rows.num_rows == 4
    assert rows.num_targets == (4 + 3) + 16 + 6 + (4 + 4)
    # Slots: a document of L tokens takes L - 1, less what it shares.
    assert rows.num_real == (8 + 3) + 16 + 6 + (7 + 3)
    assert rows.num_documents == 2 + 1 + 3 + 2
    pairs = (36 + 6) + 136 + 9 + (28 + 7 + 8 + 9)
    assert rows.useful_flops == pytest.approx(row_flops(CONFIG.model, rows.num_real, rows.num_targets, pairs))


def test_ranks_share_the_rows_and_agree_on_the_totals(loader: MemoryLoader) -> None:
    whole = step_rows(loader, range(0, 4), CONFIG, layout())
    parts = [step_rows(loader, range(0, 4), CONFIG, layout(rank, 2)) for rank in range(2)]
    assert sorted(index for part in parts for index in indices(part)) == [0, 1, 2, 3]
    for part in parts:
        assert len(part.rows) == 2
        assert dataclasses.replace(part, rows=[]) == dataclasses.replace(whole, rows=[])


def test_a_rest_is_filled_up_with_empty_rows(loader: MemoryLoader) -> None:
    parts = [step_rows(loader, range(0, 5), CONFIG, layout(rank, 2)) for rank in range(2)]
    assert [len(part.rows) for part in parts] == [3, 3]
    assert sorted(index for part in parts for index in indices(part)) == [-1, 0, 1, 2, 3, 4]
    assert parts[0].num_rows == 5 and parts[0].num_targets == 38
    # An interleaved pipeline of 2 needs an even number on every rank.
    interleaved = [
        step_rows(loader, range(0, 5), CONFIG, layout(rank, 2, 0, 2, virtual=2)) for rank in range(2)
    ]
    assert [len(part.rows) for part in interleaved] == [4, 4]


def test_only_first_and_last_stage_read_tokens(loader: MemoryLoader) -> None:
    kinds = [
        {type(row) for row in step_rows(loader, range(3), CONFIG, layout(0, 1, stage, 3)).rows}
        for stage in range(3)
    ]
    assert kinds == [{Row}, {RowLayout}, {Row}]


def test_rows_that_are_not_the_plans_are_counted(loader: MemoryLoader) -> None:
    """A reader that is one row off still reads whole rows; their targets and pairs give it away."""
    assert step_rows(loader, range(0, 4), CONFIG, layout()).num_misread == 0
    shifted = MemoryLoader(loader.pieces, row_length=16)
    shifted.row = lambda row: loader.row((row + 1) % 5)  # type: ignore[method-assign]
    assert step_rows(shifted, range(0, 4), CONFIG, layout()).num_misread == 4


def test_digests_tell_rows_and_layouts_apart(loader: MemoryLoader) -> None:
    rows = step_rows(loader, range(0, 2), CONFIG, layout())
    middle = step_rows(loader, range(0, 2), CONFIG, layout(0, 1, 1, 3))
    assert rows.digest() == middle.digest(), "a stage without tokens reads the same layout"
    digests = {
        rows.digest(),
        step_rows(loader, range(0, 3), CONFIG, layout()).digest(),
        step_rows(loader, range(1, 3), CONFIG, layout()).digest(),
        dataclasses.replace(rows, rows=rows.rows[::-1]).digest(),
    }
    for name in ("end_T", "positions_T"):
        row = rows.rows[0]
        assert isinstance(row, Row)
        changed = vars_of(row.layout)[name].copy()
        changed[3] += 1
        broken = dataclasses.replace(row, layout=dataclasses.replace(row.layout, **{name: changed}))
        digests.add(dataclasses.replace(rows, rows=[broken, *rows.rows[1:]]).digest())
    assert len(digests) == 6


def vars_of(row_layout: RowLayout) -> dict[str, np.ndarray]:
    return {"end_T": row_layout.end_T, "positions_T": row_layout.positions_T}


def test_documents_checksum_is_that_of_their_order(loader: MemoryLoader) -> None:
    first, second = (step_rows(loader, rows, CONFIG, layout()) for rows in (range(0, 2), range(2, 4)))
    assert first.documents_crc != second.documents_crc
    assert first.documents_crc == step_rows(loader, range(0, 2), CONFIG, layout(1, 2)).documents_crc


def test_an_empty_row_sees_and_predicts_nothing() -> None:
    row = empty_row(6)
    assert row.layout.end_T.tolist() == [0, 1, 2, 3, 4, 5]
    assert row.layout.num_targets == row.layout.num_real == len(row.target_ids_M) == 0
