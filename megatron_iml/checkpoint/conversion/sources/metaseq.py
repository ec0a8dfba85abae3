"""Reads metaseq's three kinds of checkpoint, tensor by tensor.

    reshard.pt                                          singleton: one file, whole tensors
    reshard-model_part-{0,1}.pt                         tensor-parallel parts, as OPT-IML-30B was released
    checkpoint_last-model_part-{0,1}-shard{0..7}.pt     training: each part flattened and cut over ranks

What enters: such a file, or a folder with the files of one checkpoint. What leaves: whole tensors in our
layout. In training files all parameters of a decoder layer are one vector, `decoder.layers.N.flat_param_0`,
those outside layers another; `shard_metadata` says which lies where. Cut over ranks, the vector is padded to
equal shards.
"""

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile, StoredTensor
from megatron_iml.checkpoint.conversion.files.torch_archive import Stub, named, read_archive
from megatron_iml.checkpoint.conversion.parameter_map import Parameter, from_metaseq_qkv, parameters
from megatron_iml.checkpoint.conversion.source import Prefix, check_complete, check_heads, same_dtype
from megatron_iml.config import ModelConfig
from megatron_iml.config.sizes import OPT_SIZES, POSITION_OFFSET

# The stem may end in .pt itself: OPT-IML's files are called checkpoint_1_4000.pt-model_part-0.pt.
FILE_NAME = re.compile(r"(?P<stem>.+?)(-model_part-(?P<part>\d+))?(-shard(?P<shard>\d+))?\.pt")
VERSION = "decoder.version"
TIED_HEAD = "decoder.output_projection.weight"
HEADS_OPTION = "decoder_attention_heads"


@dataclass(frozen=True)
class _Piece:
    """A tensor of one part: ranges of stored vectors, end to end."""

    shape: tuple[int, ...]
    ranges: tuple[tuple[StoredTensor, int, int], ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of its numbers."""
        return self.ranges[0][0].dtype

    def read(self) -> Tensor:
        """The tensor, put together from its ranges."""
        parts = [stored.read().flatten()[start:stop] for stored, start, stop in self.ranges]
        # One range is a view on its file; a tensor that two shards share has to be put together.
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)


class MetaseqSource:
    """Weights of a metaseq checkpoint."""

    kind = "metaseq"

    def __init__(self, path: Path, num_attention_heads: int | None = None) -> None:
        """Map every file, check names and shapes of every part.

        Args:
            path: one file, or a folder with the files of one checkpoint.
            num_attention_heads: needed where neither the files nor the table of published sizes say it.

        Raises:
            FileNotFoundError: a part or a shard is missing.
            ValueError: the files are no OPT, or tensors are missing, extra or misshapen.
        """
        self.path = path
        # Whether metaseq put </s> before prompts is not in its files.
        self.prefix: Prefix | None = None
        grid = _find_files(path)
        self.files = [file for part in grid for file in part]
        saved = [[_open(file) for file in part] for part in grid]
        self._parts = [_part(part, files) for part, files in zip(saved, grid, strict=True)]
        self.model = _model(path, self._parts, saved[0][0], num_attention_heads)
        check_heads(str(path), self.model)
        for part, files in zip(self._parts, grid, strict=True):
            _check_part(files[0], part, self.model, len(self._parts))

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type of a tensor."""
        parts = [part[parameter.metaseq].dtype for part in self._parts]
        return same_dtype(str(self.path), parameter.metaseq, parts)

    def read(self, parameter: Parameter) -> Tensor:
        """One whole tensor in our layout, from its parts."""
        parts = [part[parameter.metaseq].read() for part in self._parts]
        if parameter.is_qkv:
            head_dim = self.model.hidden_size // self.model.num_attention_heads
            # Part by part, before they are joined: each holds the keys, values and queries of its own heads.
            parts = [from_metaseq_qkv(part, head_dim) for part in parts]
        if parameter.cut is None:
            # Of a tensor that is not cut every part has a copy, and all of them were trained.
            self._check_replicas(parameter.metaseq, parts)
            return parts[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts, parameter.cut)

    def raw(self, name: str) -> list[Tensor]:
        """A tensor's parts by its name in the files."""
        return [part[name].read() for part in self._parts]

    def _check_replicas(self, name: str, parts: list[Tensor]) -> None:
        for number, part in enumerate(parts):
            # metaseq's own tools warn and take the first: training has then gone wrong unseen.
            if not torch.equal(part, parts[0]):
                distance = (part.float() - parts[0].float()).abs().max().item()
                raise ValueError(
                    f"{self.path}: tensor {name} of part {number} differs from part 0's by up to "
                    f"{distance:.3g}; allowed: equal copies, as it is not cut; the parts are not of one "
                    "checkpoint, or ranks had drifted apart in training"
                )


def _find_files(path: Path) -> list[list[Path]]:
    """Files by part and shard; every number from 0 must be there."""
    # Named by itself it is taken by itself; a part alone is refused later, for its shapes.
    if not path.is_dir():
        return [[path]]
    # By stem: parts of two steps in one folder would fit together, and be no model.
    found: dict[str, dict[tuple[int, int], Path]] = {}
    for file in sorted(path.glob("*.pt")):
        match = FILE_NAME.fullmatch(file.name)
        assert match is not None, f"{file.name} ends in .pt and did not match"
        # A file without a number is the only one of its kind.
        place = (int(match["part"] or 0), int(match["shard"] or 0))
        found.setdefault(match["stem"], {})[place] = file
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found)} checkpoints ({', '.join(sorted(found)) or 'no .pt file'}); allowed: "
            "one; name one file, or a folder with the files of one checkpoint"
        )
    (files,) = found.values()
    num_parts, num_shards = (1 + max(place[axis] for place in files) for axis in (0, 1))
    for part, shard in itertools.product(range(num_parts), range(num_shards)):
        if (part, shard) not in files:
            raise FileNotFoundError(
                f"{path} lacks the file of part {part}, shard {shard}: it has {len(files)} of the "
                f"{num_parts} x {num_shards} files that their numbers ask for; copy the rest"
            )
    return [[files[part, shard] for shard in range(num_shards)] for part in range(num_parts)]


def _open(file: Path) -> dict[str, Any]:
    saved = read_archive(MappedFile(file))
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(
            f"{file} holds no `model`; allowed: a checkpoint of metaseq, or a folder with config.json, or a "
            "native checkpoint; name one of these"
        )
    return saved


def _part(shards: list[dict[str, Any]], files: list[Path]) -> dict[str, _Piece]:
    """Tensors of one tensor-parallel part by metaseq's name."""
    flat = [shard.get("shard_metadata") for shard in shards]
    if any(flat):
        if not all(flat):
            bare = files[[bool(one) for one in flat].index(False)]
            raise ValueError(
                f"{bare} has no shard_metadata, other shards have: the files are of two checkpoints"
            )
        return _unflatten(shards, files)
    if len(shards) > 1:
        raise ValueError(
            f"{files[0]} is one of {len(shards)} shards without shard_metadata: nothing says which parameter "
            "lies where; take the files that training wrote, or metaseq's consolidated ones"
        )
    tensors = named(shards[0]["model"])
    return {name: _Piece(one.shape, ((one, 0, math.prod(one.shape)),)) for name, one in tensors.items()}


def _unflatten(shards: list[dict[str, Any]], files: list[Path]) -> dict[str, _Piece]:
    states = [named(shard["model"]) for shard in shards]
    pieces: dict[str, _Piece] = {}
    flats = [_flat_parameters(shard["shard_metadata"]) for shard in shards]
    for place, first in flats[0].items():
        stored = []
        for state, flat, file in zip(states, flats, files, strict=True):
            if place not in state or place not in flat:
                raise ValueError(f"{file} lacks tensor {place}, which its shard_metadata or another lists")
            length = math.prod(state[place].shape) - flat[place]["padding"]
            stored.append((state[place], max(0, length)))
        numels = [int(numel) for numel in first["numels"]]
        # Lengths without padding: what the shards hold must be what the metadata counts.
        if sum(numels) != sum(length for _, length in stored):
            raise ValueError(
                f"{files[0].parent}: the shards of tensor {place} hold {sum(n for _, n in stored)} numbers, "
                f"its parameters {sum(numels)}: a shard is missing or of another checkpoint"
            )
        # One more than there are names: the end of the last.
        starts = itertools.accumulate(numels, initial=0)
        for name, shape, start, numel in zip(first["names"], first["shapes"], starts, numels, strict=False):
            # Names count from the module that was flattened, whose name the flat parameter's begins with.
            path = place.rpartition(".")[0]
            full_name = f"{path}.{name}" if path else name
            pieces[full_name] = _Piece(tuple(shape), tuple(_ranges(stored, start, start + numel)))
    # Buffers are not flattened; every shard has them.
    for name in shards[0]["shard_metadata"]["buffer_names"]:
        if name in states[0]:
            one = states[0][name]
            pieces[name] = _Piece(one.shape, ((one, 0, math.prod(one.shape)),))
    return pieces


def _flat_parameters(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Names, shapes, lengths and padding by the flat parameter's full name."""
    return {
        f"{entry['fsdp_path']}.{name}" if entry["fsdp_path"] else name: parameter
        for entry in metadata["param_metadata"]
        for name, parameter in entry["params"].items()
    }


def _ranges(
    stored: list[tuple[StoredTensor, int]], start: int, stop: int
) -> Iterator[tuple[StoredTensor, int, int]]:
    """Where the numbers from `start` to `stop` of the joined vector lie."""
    before = 0
    for tensor, length in stored:
        low, high = max(start, before), min(stop, before + length)
        if low < high:
            yield tensor, low - before, high - before
        before += length


def _model(
    path: Path, parts: list[dict[str, _Piece]], saved: Mapping[str, Any], heads: int | None
) -> ModelConfig:
    """The shape, from the tensors; the number of heads is in none of them."""
    first = parts[0]
    layers = {int(match[1]) for name in first if (match := re.match(r"decoder\.layers\.(\d+)\.", name))}
    _refuse_350m(path, first)
    needed = ("decoder.embed_tokens.weight", "decoder.embed_positions.weight", "decoder.layers.0.fc1.weight")
    missing = [name for name in needed if name not in first]
    if missing:
        raise ValueError(f"{path} lacks tensor {missing[0]} ({len(first)} found): it is no whole OPT")
    # Of words and of fc1 each part has some rows, of positions all.
    words, positions, fc1 = (first[name].shape for name in needed)
    hidden = positions[1]
    published = {(size.num_layers, size.hidden_size): size for size in OPT_SIZES.values()}
    size = published.get((max(layers) + 1, hidden))
    told = [
        (heads, "--num-attention-heads (a run's model.num_attention_heads)"),
        # Older checkpoints call it args.
        (_heads_of(saved.get("cfg", saved.get("args"))), "the file's configuration"),
        (size.num_attention_heads if size else None, "the published size of this shape"),
    ]
    known = [(number, where) for number, where in told if number is not None]
    if not known:
        raise ValueError(
            f"{path} does not say how many attention heads the model has, and {max(layers) + 1} layers of "
            f"width {hidden} are no published OPT; set --num-attention-heads"
        )
    if len({number for number, _ in known}) > 1:
        raise ValueError(
            f"{path}: attention heads are {', '.join(f'{number} by {where}' for number, where in known)}; "
            "allowed: one number; correct the one that is wrong"
        )
    return ModelConfig(
        num_layers=max(layers) + 1,
        hidden_size=hidden,
        num_attention_heads=known[0][0],
        ffn_hidden_size=fc1[0] * len(parts),
        max_position_embeddings=positions[0] - POSITION_OFFSET,
        vocab_size=words[0] * len(parts),
    )


def _refuse_350m(path: Path, names: Mapping[str, Any]) -> None:
    for name in ("decoder.project_in_dim.weight", "decoder.project_out_dim.weight"):
        if name in names:
            raise ValueError(
                f"{path} has tensor {name}: it is OPT-350m's variant (post-norm, projected embedding), which "
                "is not supported: use another size of the family"
            )


def _check_part(file: Path, part: Mapping[str, _Piece], model: ModelConfig, num_parts: int) -> None:
    """Names and shapes of one part; buffers and a tied head may be there or not."""
    expected: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(model).values():
        shape = list(parameter.shape)
        if parameter.cut is not None:
            shape[parameter.cut] //= num_parts
        expected[parameter.metaseq] = tuple(shape)
    # Neither is a parameter: the version is a constant, and the tied head repeats the embedding.
    found = {name: piece.shape for name, piece in part.items() if name not in (VERSION, TIED_HEAD)}
    check_complete(str(file), expected, found)
    if VERSION in part and part[VERSION].read().item() < 2:
        # metaseq then drops the final norm without a word.
        raise ValueError(
            f"{file}: tensor {VERSION} is {part[VERSION].read().item():g}; allowed: 3, or none; below 2 it "
            "means a model without the final LayerNorm, which is no OPT"
        )
    if TIED_HEAD in part and not torch.equal(
        part[TIED_HEAD].read(), part["decoder.embed_tokens.weight"].read()
    ):
        raise ValueError(
            f"{file}: tensor {TIED_HEAD} differs from decoder.embed_tokens.weight; allowed: a tied head, as "
            "in every OPT"
        )


def _heads_of(configuration: Any) -> int | None:
    """Look for the number of heads in a configuration of plain data and stubs, of whatever nesting."""
    if isinstance(configuration, Stub):
        return _heads_of(configuration.state) or _heads_of(configuration.items)
    if isinstance(configuration, tuple | list):
        return next((heads for item in configuration if (heads := _heads_of(item))), None)
    if not isinstance(configuration, dict | OrderedDict):
        return None
    found = configuration.get(HEADS_OPTION)
    while isinstance(found, Stub) and isinstance(found.state, dict):
        # A node of OmegaConf keeps its value under this name.
        found = found.state.get("_val")
    if isinstance(found, int):
        return found
    # Nodes of OmegaConf point back to their parents: those must not be walked again.
    children = [value for key, value in configuration.items() if key not in ("_parent", "_metadata")]
    return _heads_of(children)
