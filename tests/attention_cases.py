"""What the tests of document attention share: rows of documents, who sees whom, and the op on a row."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_iml.kernels.document_attention import DocumentBounds, document_attention
from megatron_iml.kernels.testing import documents_end, random_forest_end, tree_end

KEY = 2**63 + 12345  # as an int64 it is negative
FIRST_HEAD = 3  # not 0, or masks that forget it would be right

ENDS = {
    "63 slots": documents_end([63]),
    "65 slots": documents_end([65]),
    "documents of one slot": documents_end([1] * 70 + [9]),
    "one document over three tiles": documents_end([150]),
    "padding only": documents_end([], padding=66),
    "padding behind": documents_end([5, 60, 1, 70], padding=9),
    "trunk and branches": tree_end(70, [3, 80, 1, 30]),
    "forest": random_forest_end(5, 150, 60),
    "forest of short trees": random_forest_end(11, 131, 9),
}


def visible(end_T: Tensor) -> Tensor:
    """The formula: row sees column if and only if column <= row < end[column]."""
    index_T = torch.arange(end_T.numel(), device=end_T.device)
    return (index_T <= index_T[:, None]) & (index_T[:, None] < end_T)


def attend(
    end_T: Tensor,
    probability: float,
    qkv: Tensor,
    op: Callable[..., Tensor] = document_attention,
    pairs: int | None = None,
) -> tuple[Tensor]:
    bounds = DocumentBounds.from_end(end_T, pairs)
    return (op(qkv, bounds, qkv.shape[3] ** -0.5, probability, KEY, FIRST_HEAD),)
