"""Converts weights from one format to another, tensor by tensor.

    source = open_source(Path("opt-6.7b"))
    target = native_target(model, dtypes)
    convert(source, target, Path("weights/opt-6.7b"))

A tensor is read as a view on its file, laid out anew if need be, and written into its gap: memory is bounded
by the largest tensor and its copy, whatever the model. `PartialFolder` makes the result appear as a whole or
not at all; conversion.json in it says where the weights came from and holds a checksum of every tensor.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iml.config import ModelConfig

from .manifest import FORMAT_VERSION, MANIFEST
from .parameter_map import WORD_EMBEDDING, Parameter, groups, parameters
from .partial import PartialFolder
from .source import Source
from .target import Piece, Target

WRITTEN_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What every target can be written in, and a run can load."""


def types_of(source: Source, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Type of every parameter after conversion: the source's own, or one for all.

    Raises:
        ValueError: if a tensor would keep a type that weights do not have here.
    """
    types = {name: dtype or source.dtype(one) for name, one in parameters(source.model).items()}
    for name, found in types.items():
        if found not in WRITTEN_TYPES:
            raise ValueError(
                f"{source.path}: tensor {name} has type {found}; allowed: "
                f"{', '.join(map(str, WRITTEN_TYPES))}; choose one with --dtype"
            )
    return types


def convert(
    source: Source,
    target: Target,
    output: Path,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write the target's folder.

    Args:
        source: where weights are read.
        target: what is written; its shape is the source's but for the vocabulary.
        output: the folder, which must not exist.
        dtype: the type to round to; None keeps every tensor's bits.
        advance: told the bytes of each tensor, for a progress bar.
        verify: called on the finished folder before it gets its name; raises if it is wrong.

    Raises:
        ValueError: if the source is damaged or holds numbers that no trained weights are, the output exists,
            or the disk is too small.
        OSError: if writing fails; the same command goes on.
    """
    request = _request(source, target, dtype)
    with PartialFolder(output, target.files, request) as partial:
        # Group by group, for a kill costs what is not in the journal yet: a layer.
        for label, group in groups(target.model):
            if label in partial.done:
                # Told all the same, so that the bar of a conversion that goes on ends at 100 %.
                advance(sum(plan_bytes(one, source, dtype) for one in group))
            else:
                partial.write_group(label, _pieces(source, target, group, dtype, advance))
        for name, data in target.texts.items():
            partial.write_text(name, data)
        manifest = {"format_version": FORMAT_VERSION, **request, "tensors": partial.checksums()}
        # After the tensors: it holds their checksums, and a reader may trust a folder that has it.
        partial.write_text(MANIFEST, json.dumps(manifest, indent=1).encode())
        target.finish(partial.folder)
        if verify is not None:
            # Before the folder has its name: what fails here never existed for others.
            verify(partial.folder)
        partial.reveal()


def total_bytes(source: Source, target: Target, dtype: torch.dtype | None) -> int:
    """What `advance` will be told in all."""
    return sum(plan_bytes(one, source, dtype) for _, group in groups(target.model) for one in group)


def plan_bytes(parameter: Parameter, source: Source, dtype: torch.dtype | None) -> int:
    """Bytes of one parameter in the output."""
    itemsize = (dtype or source.dtype(parameter)).itemsize
    return torch.Size(parameter.shape).numel() * itemsize


def _request(source: Source, target: Target, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a conversion is; equal requests write equal bytes."""
    # Lists, for it is compared with what a journal in JSON gives back: a tuple would never be equal.
    # Size and time of change, not a digest: reading 349 GB twice would double the conversion.
    files = {
        str(file): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in (f.absolute() for f in source.files)
    }
    return {
        "source": {"format": source.kind, "path": str(source.path.absolute()), "files": files},
        "target": {"format": target.kind, **target.options},
        "model": asdict(target.model),
        "dtype": None if dtype is None else str(dtype),
        "sizes": {name: plan.size for name, plan in target.files.items()},
    }


def _pieces(
    source: Source,
    target: Target,
    group: list[Parameter],
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> Iterator[Piece]:
    theirs = parameters(source.model)
    for parameter in group:
        full = source.read(theirs[parameter.name])
        # Before padding and rounding, which make numbers that the file does not hold.
        _check_values(source, parameter.name, full)
        if parameter.name == WORD_EMBEDDING:
            full = fit_vocabulary(full, target.model)
        if dtype is not None:
            full = _round(source, parameter.name, full, dtype)
        # Shapes were checked when the source was opened; a rule of the table that is wrong shows here.
        assert tuple(full.shape) == parameter.shape, f"{parameter.name}: {full.shape}, not {parameter.shape}"
        yield from target.pieces(parameter, full)
        advance(full.nbytes)


def fit_vocabulary(full: Tensor, model: ModelConfig) -> Tensor:
    """Rows of zeros up to the vocabulary, or the rows that only pad it cut off."""
    rows = model.vocab_size
    if rows <= full.shape[0]:
        return full[:rows]
    return torch.nn.functional.pad(full, (0, 0, 0, rows - full.shape[0]))


def _check_values(source: Source, name: str, full: Tensor) -> None:
    """Refuse what no trained weights are: files that were never filled, or damaged where no checksum is."""
    low, high = (value.item() for value in torch.aminmax(full))
    # In this form NaN, which aminmax hands on, is refused as well: it compares false with everything.
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(
            f"{source.path}: tensor {name} holds {low} and {high}; allowed: finite numbers; the file is "
            "damaged, or training had diverged"
        )
    # Matrices only: a bias or a norm that training left at one value is possible.
    if full.dim() == 2 and low == high:
        raise ValueError(
            f"{source.path}: every number of tensor {name} is {low:g}: the file was never filled; "
            "copy it again"
        )


def _round(source: Source, name: str, full: Tensor, dtype: torch.dtype) -> Tensor:
    # Of finite numbers, as was checked before: what is not finite after this has overflowed.
    rounded = full.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"{source.path}: tensor {name} holds up to {full.abs().max().item():g}, more than {dtype} can; "
            "choose another --dtype"
        )
    return rounded
