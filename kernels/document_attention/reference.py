"""Document attention in plain torch: the truth that every kernel is measured against.

    out[row] = sum over visible col of dropout(softmax(scale * q[row] . k[col])) * v[col]
    visible: col <= row < end[col]

What enters: one packed row's fused projection and its bounds. What leaves: the attention output. Between two
neighbouring values of `end` all rows see the same earlier columns, so the row falls into segments; each
gathers just the columns it sees. No mask of the whole row is ever built, and a NaN in one document cannot
reach another, because its columns are never read.

Shapes: T tokens of the row, H heads, D head size, R rows of a segment, C columns it sees.
"""

import torch
from torch import Tensor

from ..philox import keep_mask
from .bounds import DocumentBounds


def document_attention_reference(
    qkv_TH3D: Tensor,
    bounds: DocumentBounds,
    softmax_scale: float,
    dropout_probability: float = 0.0,
    dropout_key: int | Tensor = 0,
    first_head: int = 0,
) -> Tensor:
    """Attention of every token to the tokens of its own document at or before it.

    Args:
        qkv_TH3D: [tokens, heads, 3, head size], query, key and value of each head side by side; any float
            type.
        bounds: who sees whom.
        softmax_scale: factor on the scores, usually head size ** -0.5.
        dropout_probability: share of attention probabilities dropped; the rest is scaled by 1 / (1 - p).
        dropout_key: Philox key of this row, layer and place, an int or an int64 tensor of no dimensions.
        first_head: global index of the first head here, so that masks do not depend on tensor parallelism.

    Returns:
        [tokens, heads, head size] in the type of qkv, computed in fp32 (fp64 for fp64 input). Rows that see
        nothing are zero.
    """
    heads = qkv_TH3D.shape[1]
    # Never in bf16 or fp16: this is the truth, and it trains where there are no kernels.
    precision = torch.promote_types(qkv_TH3D.dtype, torch.float32)
    q_HTD, k_HTD, v_HTD = qkv_TH3D.to(precision).permute(2, 1, 0, 3)
    heads_H = torch.arange(first_head, first_head + heads, device=qkv_TH3D.device)
    everything = torch.ones((), dtype=torch.bool, device=qkv_TH3D.device)
    pieces: list[Tensor] = []
    edges = _segment_edges(bounds.end_T)
    for first, stop in zip(edges[:-1], edges[1:], strict=True):
        # Columns [C] that the segment's rows see, up to the diagonal; in a tree they have gaps.
        visible_C = torch.nonzero(bounds.end_T[:stop] > first).squeeze(1)
        if visible_C.numel() == 0:
            # Zeros that still depend on the input: a row of padding alone has a backward like any other.
            pieces.append(q_HTD[:, first:stop].masked_fill(everything, 0.0))
            continue
        rows_R = torch.arange(first, stop, device=visible_C.device)
        scores_HRC = softmax_scale * q_HTD[:, first:stop] @ k_HTD[:, visible_C].transpose(1, 2)
        # Inside a segment nothing but the diagonal is left to mask.
        scores_HRC = scores_HRC.masked_fill(visible_C[None, None, :] > rows_R[None, :, None], float("-inf"))
        probabilities_HRC = torch.softmax(scores_HRC, dim=-1)
        if dropout_probability > 0.0:
            keep_HRC = keep_mask(dropout_key, dropout_probability, rows_R, visible_C, heads_H)
            probabilities_HRC = probabilities_HRC * keep_HRC / (1.0 - dropout_probability)
        pieces.append(probabilities_HRC @ v_HTD[:, visible_C])
    return torch.cat(pieces, dim=1).transpose(0, 1).to(qkv_TH3D.dtype)


def _segment_edges(end_T: Tensor) -> list[int]:
    """First row of every segment, then the number of rows."""
    index_T = torch.arange(end_T.numel(), device=end_T.device)
    # Padding between documents: alone in its segment, or the softmax of a row without columns would be NaN.
    blind_P = index_T[end_T <= index_T]
    edges = torch.cat([end_T, blind_P, blind_P + 1]).unique().tolist()
    return [0, *(edge for edge in edges if 0 < edge < end_T.numel()), end_T.numel()]
