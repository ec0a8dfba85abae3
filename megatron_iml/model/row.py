"""What the model sees of one packed row, on a device.

    MicroBatch   a `data.rows.assemble.Row` as tensors: tokens and targets only where a stage needs them
    RowContext   what every layer needs: who sees whom, and which masks to draw

T slots of the row, M targets.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_iml.data.rows.assemble import Row
from megatron_iml.data.rows.layout import RowLayout
from megatron_iml.kernels.document_attention import DocumentBounds, RowBounds

from .cache import KeyValueCache


@dataclass(frozen=True)
class RowContext:
    """Passed unchanged through every layer of every stage."""

    row: int
    """Index of the row in the plan: part of every dropout key."""
    bounds: DocumentBounds
    keys_LP: Tensor | None = None
    """Dropout keys of the chunk that runs now (`dropout.py`); None where nothing is dropped."""
    cache: KeyValueCache | None = None
    """Where the layers leave keys and values when the row is prompts to be continued."""


@dataclass(frozen=True)
class MicroBatch:
    """One packed row. Index tensors are int64, `tokens_T` and the targets are None on stages without them."""

    context: RowContext
    positions_T: Tensor
    tokens_T: Tensor | None
    target_rows_M: Tensor | None
    target_ids_M: Tensor | None

    @property
    def num_targets(self) -> int:
        """Targets of this row; only the last stage knows them."""
        assert self.target_rows_M is not None, "a stage without targets was asked for their number"
        return self.target_rows_M.numel()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, behind what is queued there; the host does not wait."""
    # From pageable memory a copy waits for everything that is queued on the device before it.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _index(array: np.ndarray, device: torch.device) -> Tensor:
    # A copy, since the array may be a view of a mapped file; int64 is what embedding and index_select take.
    return send(torch.from_numpy(array.astype(np.int64)), device)


def to_device(source: Row | RowLayout, device: torch.device) -> MicroBatch:
    """Move a row, or only its layout on a middle stage, to the device."""
    layout = source.layout if isinstance(source, Row) else source
    row = source if isinstance(source, Row) else None
    # int32 as the attention kernels read it.
    end_T = torch.from_numpy(np.ascontiguousarray(layout.end_T, dtype=np.int32))
    return MicroBatch(
        context=RowContext(row=layout.index, bounds=RowBounds.from_host(end_T, device)),
        positions_T=_index(layout.positions_T, device),
        tokens_T=_index(row.tokens_T, device) if row else None,
        target_rows_M=_index(row.target_rows_M, device) if row else None,
        target_ids_M=_index(row.target_ids_M, device) if row else None,
    )
