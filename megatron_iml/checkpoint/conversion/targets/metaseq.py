"""Lays out metaseq checkpoints: a singleton, tensor-parallel parts, or training files with flat parameters.

    metaseq_target(model, dtypes, 1, None)     reshard.pt
    metaseq_target(model, dtypes, 2, None)     reshard-model_part-{0,1}.pt
    metaseq_target(model, dtypes, 2, 4)        checkpoint_last-model_part-{0,1}-shard{0..3}.pt

Every file has `decoder.version` = 3: without it metaseq leaves out the final LayerNorm and says nothing.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_iml.checkpoint.conversion.files.plan import TensorSpec, torch_archive
from megatron_iml.checkpoint.conversion.parameter_map import WORD_EMBEDDING, Parameter, groups, to_metaseq_qkv
from megatron_iml.checkpoint.conversion.sources.metaseq import VERSION
from megatron_iml.checkpoint.conversion.target import Piece, Target
from megatron_iml.config import ModelConfig


def metaseq_target(
    model: ModelConfig, dtypes: Mapping[str, torch.dtype], num_parts: int, num_shards: int | None
) -> Target:
    """Plan a checkpoint.

    Args:
        model: the shape.
        dtypes: type of every parameter.
        num_parts: tensor-parallel parts.
        num_shards: files per part, with flat parameters; None: one file per part, with whole tensors.

    Raises:
        ValueError: if the parts do not divide heads, feed-forward layer and vocabulary, or flat parameters
            would mix types.
    """
    _check_parts(model, num_parts)
    layout: _Whole | _Flat
    if num_shards is None:
        layout = _Whole(model, num_parts)
    else:
        layout = _Flat(model, num_parts, num_shards)
    files = {name: torch_archive(content) for name, content in layout.files(dtypes)}
    head_dim = model.hidden_size // model.num_attention_heads

    def pieces(parameter: Parameter, full: Tensor) -> Iterator[Piece]:
        """Every part's own rows or columns, in metaseq's order."""
        for part in range(num_parts):
            # Cut first: rows are in the order of heads, so a part gets whole heads, then their order changes.
            own = full if parameter.cut is None else full.chunk(num_parts, parameter.cut)[part]
            own = to_metaseq_qkv(own, head_dim) if parameter.is_qkv else own
            yield from layout.pieces(parameter, part, own.contiguous())
        # A constant of every file; the word embedding comes once.
        if parameter.name == WORD_EMBEDDING:
            for name in files:
                yield name, VERSION, torch.tensor([3.0])

    chosen = {"parts": num_parts, "shards": num_shards}
    return Target("metaseq", model, files, pieces, chosen)


def _check_parts(model: ModelConfig, num_parts: int) -> None:
    # What metaseq's tensor parallelism cuts; heads first, which limit it most.
    for what, size in (
        ("attention heads", model.num_attention_heads),
        ("feed-forward features", model.ffn_hidden_size),
        ("vocabulary rows", model.vocab_size),
    ):
        if size % num_parts:
            raise ValueError(
                f"--parts: got {num_parts}; allowed: a divisor of the model's {size} {what}; choose another"
                + (", or --vocab-size" if what == "vocabulary rows" else "")
            )


def _part_shape(parameter: Parameter, num_parts: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if parameter.cut is not None:
        shape[parameter.cut] //= num_parts
    return tuple(shape)


def _configuration(model: ModelConfig) -> dict[str, Any]:
    """The shape under metaseq's names, as plain data."""
    return {
        "model": {
            "decoder_layers": model.num_layers,
            "decoder_embed_dim": model.hidden_size,
            "decoder_ffn_embed_dim": model.ffn_hidden_size,
            "decoder_attention_heads": model.num_attention_heads,
            "max_target_positions": model.max_position_embeddings,
            "activation_fn": "relu",
            "decoder_learned_pos": True,
            "decoder_normalize_before": True,
            # Otherwise metaseq would multiply embeddings by the root of the width.
            "no_scale_embedding": True,
            "share_decoder_input_output_embed": True,
        }
    }


@dataclass(frozen=True)
class _Whole:
    """Tensors as they are, one file per part."""

    model: ModelConfig
    num_parts: int

    def name(self, part: int) -> str:
        """File of a part."""
        # As metaseq's released checkpoints are called.
        return "reshard.pt" if self.num_parts == 1 else f"reshard-model_part-{part}.pt"

    def files(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Any]]:
        """Name and content of every file, tensors as gaps."""
        for part in range(self.num_parts):
            tensors = {
                one.metaseq: TensorSpec(dtypes[one.name], _part_shape(one, self.num_parts), one.metaseq)
                for _, group in groups(self.model)
                for one in group
            }
            version = TensorSpec(torch.float32, (1,), VERSION)
            yield self.name(part), {"cfg": _configuration(self.model), "model": {VERSION: version, **tensors}}

    def pieces(self, parameter: Parameter, part: int, own: Tensor) -> Iterator[Piece]:
        """The one place of a part of a parameter."""
        yield self.name(part), parameter.metaseq, own


class _Flat:
    """Parameters of each decoder layer, and those outside layers, as one vector, cut into equal shards."""

    def __init__(self, model: ModelConfig, num_parts: int, num_shards: int) -> None:
        self.model, self.num_parts, self.num_shards = model, num_parts, num_shards
        self.groups = [group for _, group in groups(model)]
        self.starts: dict[str, int] = {}
        for group in self.groups:
            numels = [self.numel(parameter) for parameter in group]
            starts = itertools.accumulate(numels, initial=0)
            # `accumulate` ends with the total, which begins nothing.
            self.starts.update({one.name: start for one, start in zip(group, starts, strict=False)})

    def numel(self, parameter: Parameter) -> int:
        """Numbers of one part."""
        return math.prod(_part_shape(parameter, self.num_parts))

    def shards(self, group: list[Parameter]) -> list[tuple[int, int]]:
        """First and last + 1 number of each shard's own; all but the last ones have the same length."""
        total = sum(self.numel(parameter) for parameter in group)
        # FSDP's rule: equal lengths, rounded up, the last shards padded.
        length = -(-total // self.num_shards)
        return [
            (min(shard * length, total), min((shard + 1) * length, total)) for shard in range(self.num_shards)
        ]

    def name(self, part: int, shard: int) -> str:
        """File of a shard of a part."""
        return f"checkpoint_last-model_part-{part}-shard{shard}.pt"

    def files(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Any]]:
        """Name and content of every file, flat vectors as gaps."""
        found = sorted({str(dtype) for dtype in dtypes.values()})
        if len(found) != 1:
            raise ValueError(
                f"--shards: flat parameters hold one type, the model has {', '.join(found)}; set --dtype"
            )
        # Any tensor's: there is one type, as was just seen.
        dtype = dtypes[WORD_EMBEDDING]
        for part, shard in itertools.product(range(self.num_parts), range(self.num_shards)):
            state: dict[str, Any] = {}
            metadata = []
            for group in self.groups:
                path, key = _flat_names(group)
                (first, last), (start, stop) = self.shards(group)[0], self.shards(group)[shard]
                # Shards are padded to the length of the first.
                state[key] = TensorSpec(dtype, (last - first,), key)
                # Names without the module's path, which metaseq puts before them again.
                flat = {
                    "names": [one.metaseq.removeprefix(f"{path}.") if path else one.metaseq for one in group],
                    "shapes": [_part_shape(one, self.num_parts) for one in group],
                    "numels": [self.numel(one) for one in group],
                    "padding": (last - first) - (stop - start),
                }
                metadata.append({"fsdp_path": path, "params": {"flat_param_0": flat}})
            state[VERSION] = TensorSpec(torch.float32, (1,), VERSION)
            content = {"param_metadata": metadata, "buffer_names": [VERSION], "shared_param_info": []}
            saved = {"cfg": _configuration(self.model), "model": state, "shard_metadata": content}
            yield self.name(part, shard), saved

    def pieces(self, parameter: Parameter, part: int, own: Tensor) -> Iterator[Piece]:
        """The ranges of a part of a parameter, by the shards they lie in."""
        # Group 0 is everything outside of layers.
        group = self.groups[0 if parameter.layer is None else parameter.layer + 1]
        _, key = _flat_names(group)
        start, flat = self.starts[parameter.name], own.flatten()
        ranges = self.shards(group)
        for shard, (low, high) in enumerate(ranges):
            first, last = max(low, start), min(high, start + len(flat))
            if first < last:
                yield self.name(part, shard), key, flat[first - start : last - start]
        # A record is filled in order, and padding is what comes last.
        if parameter == group[-1]:
            for shard, (low, high) in enumerate(ranges):
                padding = (ranges[0][1] - ranges[0][0]) - (high - low)
                if padding:
                    yield self.name(part, shard), key, flat.new_zeros(padding)


def _flat_names(group: list[Parameter]) -> tuple[str, str]:
    """Path of the wrapped module, and name of its flat parameter."""
    layer = group[0].layer
    path = "" if layer is None else f"decoder.layers.{layer}"
    return path, f"{path}.flat_param_0" if path else "flat_param_0"
