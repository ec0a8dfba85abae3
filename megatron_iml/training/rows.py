"""Which rows this rank runs in a step, and what it reads of each.

What enters: the loader over a mapped plan, this rank's place. What leaves: `StepRows`, the dealt rows of one
step with the numbers every rank knows beforehand: targets, real tokens, useful FLOPs. Tokens and targets are
read on the first and last stage only; every stage reads the row's layout from the plan itself, nothing is
broadcast.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_iml.config import Config
from megatron_iml.data.rows.assemble import Row, assemble_row
from megatron_iml.data.rows.layout import RowLayout
from megatron_iml.data.rows.loader import Loader
from megatron_iml.model.row import MicroBatch, to_device
from megatron_iml.parallel.groups import Layout
from megatron_iml.parallel.rows import deal_rows

from .flops import row_flops


@dataclass(frozen=True)
class StepRows:
    """Rows of one step: this rank's own, and totals over all ranks."""

    rows: list[Row | RowLayout]
    num_rows: int
    num_targets: int
    num_real: int
    num_documents: int
    useful_flops: float
    documents_crc: int
    """Checksum of the documents of all ranks in order: two runs read the same data iff these agree."""
    num_misread: int = 0
    """Own rows with other targets or visible pairs than the plan states: the reader or the plan is wrong."""

    def digest(self) -> int:
        """A number that differs if a rank reads other rows, or another layout of a row."""
        crc = 0
        for row in self.rows:
            layout = row.layout if isinstance(row, Row) else row
            crc = zlib.crc32(np.int64(layout.index).tobytes(), crc)
            crc = zlib.crc32(layout.end_T.tobytes(), crc)
            # Not the tokens: middle stages have none.
            crc = zlib.crc32(layout.positions_T.tobytes(), crc)
        return crc

    def micro_batches(self, layout: Layout) -> list[Iterator[MicroBatch]]:
        """One iterator per model chunk over the same rows, moved to the device when their turn comes."""
        # Generators: a row is on the device from its own turn on, not from the first one's. One for each
        # chunk, since interleaved chunks come to a row at different times.
        return [(to_device(row, layout.device) for row in self.rows) for _ in range(layout.virtual_size)]


def step_rows(loader: Loader, rows: range, config: Config, layout: Layout) -> StepRows:
    """Deal a range of the plan's rows to the data-parallel ranks and read this rank's.

    A range that does not divide evenly is filled up with empty rows, so that every rank runs as many.
    """
    plan = loader.plan
    # R rows of the step. The plan holds their sums: thousands of rows are dealt without looking into them.
    slots_R, targets_R, pairs_R = (
        sums_R[rows.start : rows.stop].tolist() for sums_R in (plan.slots_R, plan.targets_R, plan.pairs_R)
    )
    costs = [
        row_flops(config.model, slots, targets, pairs)
        for slots, targets, pairs in zip(slots_R, targets_R, pairs_R, strict=True)
    ]
    # Interleaved stages take turns in groups of pipeline_size micro-batches.
    group = layout.data_size * (layout.pipeline_size if layout.virtual_size > 1 else 1)
    own = deal_rows([*costs, *[0.0] * (-len(rows) % group)], layout.data_size)[layout.data_rank]
    # Middle stages need no token, so they touch no page of the corpus.
    read = loader.row if layout.is_first_stage or layout.is_last_stage else loader.layout
    # Of all ranks' rows, not of this one's: a number that every rank must come to.
    documents = plan.entries_E["document"][plan.row_starts[rows.start] : plan.row_starts[rows.stop]]
    # Indices beyond the range are the empty rows that fill it up.
    own_rows = [(index, read(rows[index])) for index in own if index < len(rows)]
    padding = [empty_row(plan.row_length)] * (len(own) - len(own_rows))
    return StepRows(
        rows=[*(row for _, row in own_rows), *padding],
        num_rows=len(rows),
        num_targets=sum(targets_R),
        num_real=sum(slots_R),
        num_documents=len(documents),
        useful_flops=sum(costs),
        documents_crc=zlib.crc32(documents.tobytes()),
        # The plan wrote its sums down when it was built; here they are counted again from what was read.
        num_misread=sum(
            _targets_and_pairs(row) != (targets_R[index], pairs_R[index]) for index, row in own_rows
        ),
    )


def _targets_and_pairs(row: Row | RowLayout) -> tuple[int, int]:
    layout = row.layout if isinstance(row, Row) else row
    slots = len(layout.end_T)
    # The sum of end[col] - col; a padding slot, whose end is itself, adds nothing.
    return layout.num_targets, int(layout.end_T.sum(dtype=np.int64)) - slots * (slots - 1) // 2


def empty_row(row_length: int) -> Row:
    """A row of padding: nothing is seen, nothing is predicted."""
    return assemble_row([], row_length, index=-1)
