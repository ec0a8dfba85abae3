"""Finds out which format a checkpoint is in.

open_source(Path("opt-6.7b"))       # a folder with config.json: HuggingFaceSource
open_source(Path("parts"))          # a folder with .pt files: MetaseqSource
open_source(Path("iter_0004000"))   # a folder with complete.json: NativeSource
"""

from pathlib import Path

from megatron_iml.checkpoint.conversion.sources.hugging_face import HuggingFaceSource
from megatron_iml.checkpoint.conversion.sources.metaseq import MetaseqSource
from megatron_iml.checkpoint.conversion.sources.native import NativeSource

from .source import Source


def is_foreign(path: Path) -> bool:
    """Whether it holds weights of another format than ours, by config.json or metaseq's files."""
    # A lone file can only be metaseq's: the other two are folders.
    if path.is_file() or (path / "config.json").is_file():
        return True
    # Ours has one such file too, written by megatron-core.
    return any(file.name != "common.pt" for file in path.glob("*.pt"))


def open_source(path: Path, num_attention_heads: int | None = None) -> Source:
    """Open a native checkpoint, a Hugging Face folder, or a metaseq file or folder.

    Args:
        path: the folder, or one file of metaseq's.
        num_attention_heads: for metaseq files that do not say it and are of no published size.

    Raises:
        FileNotFoundError: if there is nothing there.
        ValueError: if it is none of the formats, or not a whole OPT.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; name a checkpoint on this disk (download a hub's model first)"
        )
    if not is_foreign(path):
        return NativeSource(path)
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    return MetaseqSource(path, num_attention_heads)
