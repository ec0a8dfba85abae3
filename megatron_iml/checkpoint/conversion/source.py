"""What weights can be read from: one interface, whatever the format, and the checks that all formats share.

    source = HuggingFaceSource(Path("opt-6.7b"))
    source.model.num_layers                                                   # 32
    source.read(parameters(source.model)["decoder.final_layernorm.bias"])     # a whole tensor, in our layout

A source is checked when it is opened: every tensor there, none that does not belong, every shape right. Data
is read tensor by tensor.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_iml.config import ModelConfig

from .parameter_map import Parameter

Prefix = Literal["none", "eos"]


class Source(Protocol):
    """Weights of one model, somewhere on disk."""

    path: Path
    kind: str
    """The format, for messages."""
    model: ModelConfig
    """The shape; vocab_size is the number of rows that the embedding has."""
    prefix: Prefix | None
    """The token that prompts begin with, where the format says so."""
    files: list[Path]
    """Every file that is read."""

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type of a tensor, without reading it."""
        ...

    def read(self, parameter: Parameter) -> Tensor:
        """One whole tensor in our layout.

        Raises:
            ValueError: if its bytes are not those that were written.
        """
        ...


def check_complete(
    where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare names and shapes of tensors, all of them before anything is read.

    Raises:
        ValueError: naming the first missing, extra or misshapen tensors.
    """
    # Missing before extra: a truncated file lacks some, files of two models have both.
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{where} lacks {_some(missing)}: {len(found)} tensors found, an OPT of this size has "
            f"{len(expected)}; check that every file was copied whole"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ValueError(
            f"{where} has {_some(extra)}, which no OPT of this size has: it is another variant, or files of "
            "two models are mixed"
        )
    # The same names on both sides from here on.
    wrong = [name for name in expected if found[name] != expected[name]]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{where}: tensor {name} has shape {found[name]}, allowed: {expected[name]} "
            f"({len(wrong)} tensors have a wrong shape); the file or its configuration is not this model's"
        )


def check_heads(where: str, model: ModelConfig) -> None:
    """Heads of equal size, before rows are sorted by them.

    Raises:
        ValueError: if they do not divide the width.
    """
    if model.num_attention_heads < 1 or model.hidden_size % model.num_attention_heads:
        raise ValueError(
            f"{where}: got {model.num_attention_heads} attention heads for a width of {model.hidden_size}; "
            "allowed: a divisor of it; correct the configuration, or --num-attention-heads"
        )


def same_dtype(where: str, name: str, dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type that all parts of one tensor have."""
    found = sorted(set(dtypes), key=str)
    # Joining parts of two types would round one of them without a word.
    if len(found) != 1:
        raise ValueError(f"{where}: the parts of {name} have types {found}; allowed: one; save it again")
    return found[0]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"tensor {shown}" if len(names) == 1 else f"tensors {shown}{' and others' if names[3:] else ''}"
