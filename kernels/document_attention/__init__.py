"""Attention inside packed documents: `document_attention` on the bounds of a row."""

from .bounds import DocumentBounds
from .op import document_attention
from .reference import document_attention_reference

__all__ = ["DocumentBounds", "document_attention", "document_attention_reference"]
