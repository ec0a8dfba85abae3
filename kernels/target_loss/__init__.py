"""LM head and cross entropy on the target rows only, in chunks, vocabulary-parallel."""

from .op import target_loss
from .reference import target_loss_reference

__all__ = ["target_loss", "target_loss_reference"]
