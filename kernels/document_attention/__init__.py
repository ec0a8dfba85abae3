"""Attention inside packed documents: `document_attention` on the bounds of a row, or flash-attn's."""

from .bounds import DocumentBounds
from .flash import RowBounds, flash_attention, load_varlen
from .op import document_attention
from .reference import document_attention_reference

__all__ = [
    "DocumentBounds",
    "RowBounds",
    "document_attention",
    "document_attention_reference",
    "flash_attention",
    "load_varlen",
]
