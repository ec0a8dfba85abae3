"""What weights can be written as: the files of a format with gaps for tensors, and who goes into which gap.

    target = hugging_face_target(model, dtypes, options)
    target.files                                       # {"model.safetensors": FilePlan}
    list(target.pieces(parameter, full))               # [("model.safetensors", "model.decoder...", tensor)]

A piece is appended to its record; a record that several tensors share gets them in the table's order.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_iml.checkpoint.conversion.files.plan import FilePlan
from megatron_iml.config import ModelConfig

from .parameter_map import Parameter
from .source import Prefix, Source

Piece = tuple[str, str, Tensor]
"""File, record, and what is appended to it."""


@dataclass(frozen=True)
class Target:
    """One model in one format, planned."""

    kind: str
    model: ModelConfig
    """The shape that is written; its vocabulary may differ from the source's."""
    files: Mapping[str, FilePlan]
    pieces: Callable[[Parameter, Tensor], Iterable[Piece]]
    """Where a whole tensor in our layout goes."""
    options: Mapping[str, object]
    """What was chosen: a conversion goes on only with the same."""
    texts: Mapping[str, bytes] = field(default_factory=dict)
    """Small files, by name."""
    finish: Callable[[Path], None] = lambda folder: None
    """Last touch on the finished folder, before it gets its name."""


VOCAB_MULTIPLE = 8
"""Native embeddings are cut over tensor-parallel ranks: OPT's 50,265 entries take 50,272 rows."""


def vocabulary(source: Source, form: str, asked: int | None) -> int:
    """Rows of the target's embedding: those asked for, or the source's, natively rounded up to 8.

    Raises:
        ValueError: if no row is left.
    """
    rows = source.model.vocab_size
    if asked is not None:
        if asked < 1:
            raise ValueError(f"--vocab-size: got {asked}; allowed: 1 or more, the source has {rows}")
        return asked
    # Ours are what tensor parallelism cuts; rows added elsewhere would be a difference nobody asked for.
    return -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if form == "native" else rows


def inference_prefix(source: Source, asked: Prefix | None) -> Prefix:
    """The token before prompts, which is a property of the weights.

    Raises:
        ValueError: if neither the user nor the source says it.
    """
    # The user knows better than a tokenizer's settings, which were often copied from the base model.
    prefix = asked or source.prefix
    if prefix is None:
        raise ValueError(
            f"--inference-prefix: {source.path} does not say which token prompts begin with; allowed: eos, "
            "as base OPT was pretrained, or none, as instruction-tuned models; set it"
        )
    return prefix
