"""Lays out a native checkpoint of weights alone, which training and evaluation load like any other.

    target = native_target(model, dtypes)
    target.files        # {"weights_00000.distcp": embeddings, norm, "weights_00001.distcp": layer 0, ...}

The format is megatron-core's torch_dist: `.metadata` lists chunks, each an archive of `torch.save` inside a
file; layers are stacked, so that layer 7 is the chunk at offset 7 of the first axis. Every linear layer has
an extra state, here empty, which megatron-core asks for when it loads.
"""

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_iml.checkpoint.conversion.files.plan import TensorSpec, side_by_side, torch_archive
from megatron_iml.checkpoint.conversion.parameter_map import Parameter, groups
from megatron_iml.checkpoint.conversion.sources.native import native_key, stacked_shape
from megatron_iml.checkpoint.conversion.target import Piece, Target
from megatron_iml.checkpoint.record import Record, RunState, describe_file, now, write_record
from megatron_iml.checkpoint.versions import versions
from megatron_iml.config import Config, ModelConfig, TrainingConfig

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core writes of itself; importing it for that would take longer than most conversions."""
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def native_target(model: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> Target:
    """Plan a checkpoint at step 0 with these weights.

    Args:
        model: the shape, and the prefix that prompts begin with.
        dtypes: type of every parameter.

    Raises:
        ValueError: if a tensor has different types in different layers.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    files, file_of = {}, {}
    for number, (_, group) in enumerate(groups(model)):
        file = f"weights_{number:05d}.distcp"
        plans = {one.name: torch_archive(_chunk(one, model, dtypes[one.name], entries)) for one in group}
        # A tensor of the stack is found by its name and where in the stack it begins.
        indices = [MetadataIndex(native_key(one), _offsets(one)) for one in group]
        # megatron-core's linear layers ask for theirs when a checkpoint is loaded, though it is None.
        for name in _extra_states(number - 1, model):
            # In a list: megatron-core saves all objects of one name together.
            entries[name], plans[name] = BytesStorageMetadata(), torch_archive([None])
            indices.append(MetadataIndex(name))
        offset = 0
        for index, plan in zip(indices, plans.values(), strict=True):
            places[index] = _StorageInfo(file, offset, plan.size)
            offset += plan.size
        files[file] = side_by_side(plans)
        file_of.update({parameter.name: file for parameter in group})
    metadata = Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)

    def pieces(parameter: Parameter, full: Tensor) -> Iterator[Piece]:
        """Whole, in the one record that a parameter has."""
        yield file_of[parameter.name], parameter.name, full

    # One word for the model: where types differ, what its matrices are in.
    precision: Any = PRECISIONS[dtypes["decoder.layers.0.mlp.linear_fc1.weight"]]
    # The shape in full: a name of the family would fill its own numbers in again.
    config = Config(model=replace(model, size=None), training=TrainingConfig(precision=precision))
    texts = _texts(metadata)
    return Target(
        kind="native",
        model=model,
        files=files,
        pieces=pieces,
        options={"inference_prefix": model.inference_prefix},
        texts=texts,
        finish=lambda folder: _mark_complete(folder, config, [*files, *texts]),
    )


def _chunk(
    parameter: Parameter, model: ModelConfig, dtype: torch.dtype, entries: dict[str, Any]
) -> TensorSpec:
    """Enter a whole tensor, or a layer's part of a stacked one."""
    shape = torch.Size(stacked_shape(parameter, model))
    new = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, [])
    entry = entries.setdefault(native_key(parameter), new)
    if entry.properties.dtype != dtype:
        raise ValueError(
            f"{parameter.name} has type {dtype}, in other layers it has {entry.properties.dtype}; allowed: "
            "one type in all layers; choose it with --dtype"
        )
    # A chunk has every axis of the whole: a layer's is one thick along the stack.
    sizes = parameter.shape if parameter.layer is None else (1, *parameter.shape)
    entry.chunks.append(ChunkStorageMetadata(_offsets(parameter), torch.Size(sizes)))
    return TensorSpec(dtype, sizes)


def _offsets(parameter: Parameter) -> torch.Size:
    zeros = [0] * len(parameter.shape)
    return torch.Size(zeros if parameter.layer is None else [parameter.layer, *zeros])


def _extra_states(layer: int, model: ModelConfig) -> list[str]:
    # The head belongs to the group of embeddings and the last norm, which comes before the layers.
    if layer < 0:
        return ["output_layer._extra_state/shard_0_1"]
    return [f"decoder.layers.{name}._extra_state/shard_{layer}_{model.num_layers}" for name in LINEARS]


def _texts(metadata: Metadata) -> dict[str, bytes]:
    """megatron-core's own small files."""
    common = io.BytesIO()
    torch.save({"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}, common)
    return {
        ".metadata": pickle.dumps(metadata),
        "common.pt": common.getvalue(),
        "metadata.json": json.dumps(FORMAT).encode(),
    }


def _mark_complete(folder: Path, config: Config, names: Iterable[str]) -> None:
    record = Record(
        # No run: steps, rows and fingerprints belong to training, and a start from here is a fresh one.
        state=RunState(0, 0, "", ""),
        config=asdict(config),
        world_size=1,
        versions=versions(),
        validation={},
        saved_at=now(),
        # Read once more: a checksum that was computed before the disk had the bytes would prove less.
        files={name: describe_file(folder / name) for name in names},
    )
    write_record(folder, record)
