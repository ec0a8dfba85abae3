"""Reads native checkpoints tensor by tensor, without process groups and without a model.

What enters: an iter_XXXXXXX folder of megatron-core's torch_dist format, saved under any layout. What leaves:
whole tensors; of the optimizer nothing.

    source = NativeSource(Path("run/checkpoints/iter_0004000"))
    source.read(parameters(source.model)["decoder.layers.7.mlp.linear_fc1.weight"])

megatron-core stacks the layers: tensor "decoder.layers.mlp.linear_fc1.weight" has shape [layers, ffn, hidden]
and is stored in chunks, one per layer and tensor-parallel rank, each an archive of `torch.save` in a .distcp
file. `.metadata` says where.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile, StoredTensor
from megatron_iml.checkpoint.conversion.files.torch_archive import read_archive
from megatron_iml.checkpoint.conversion.parameter_map import Parameter, parameters
from megatron_iml.checkpoint.conversion.source import Prefix, check_complete
from megatron_iml.checkpoint.record import read_record
from megatron_iml.config import ModelConfig


class NativeSource:
    """Weights of a native checkpoint."""

    kind = "native"

    def __init__(self, path: Path) -> None:
        """Read the metadata, check names and shapes, and that every file is there whole.

        Raises:
            FileNotFoundError: if the checkpoint is not complete, or a file is missing.
            ValueError: if tensors are missing or misshapen, or a file is truncated.
        """
        record = read_record(path)
        self.path = path
        self.model = ModelConfig(**record.config["model"])
        self.prefix: Prefix | None = self.model.inference_prefix
        self._metadata = _read_metadata(path)
        self._stored: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            # Beside them lie empty extra states of linear layers, which are objects.
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        expected = {
            native_key(one): stacked_shape(one, self.model) for one in parameters(self.model).values()
        }
        check_complete(str(path), expected, {key: tuple(entry.size) for key, entry in self._stored.items()})
        # Of the files only those with weights: a checkpoint keeps more bytes for its optimizer.
        names = {info.relative_path for index, info in self._infos() if index.fqn in self._stored}
        self.files = [path / name for name in sorted(names)]
        self._files = {file.name: _open_file(path, file) for file in self.files}
        self._check_sizes()

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type of a tensor."""
        dtype: torch.dtype = self._stored[native_key(parameter)].properties.dtype
        return dtype

    def read(self, parameter: Parameter) -> Tensor:
        """One whole tensor, put together from its chunks; a view on the file if there is one chunk."""
        full = None
        for chunk in self._stored[native_key(parameter)].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if parameter.layer is not None:
                # Layers lie along the first axis: only chunks that hold this one are read.
                if not offsets[0] <= parameter.layer < offsets[0] + sizes[0]:
                    continue
                part = self._chunk(native_key(parameter), chunk)[parameter.layer - offsets[0]]
                offsets, sizes = offsets[1:], sizes[1:]
            else:
                part = self._chunk(native_key(parameter), chunk)
            # Saved without tensor parallelism, or converted: one chunk, and no copy.
            if sizes == parameter.shape:
                return part
            # Chunks cover the tensor, which was checked, so that no zero stays.
            if full is None:
                full = torch.zeros(parameter.shape, dtype=part.dtype)
            full[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] = part
        assert full is not None, f"{parameter.name} has no chunk, though shapes and sizes were right"
        return full

    def _infos(self) -> list[tuple[MetadataIndex, _StorageInfo]]:
        return list(self._metadata.storage_data.items())

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        # By name and place: an index's third field is a hint, which equality leaves out.
        info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        try:
            stored = read_archive(self._files[info.relative_path], info.offset, info.length)
        except ValueError as error:
            raise ValueError(f"tensor {key} at {tuple(chunk.offsets)}: {error}") from error
        if not isinstance(stored, StoredTensor) or stored.shape != tuple(chunk.sizes):
            raise ValueError(
                f"{self.path / info.relative_path}: tensor {key} at {tuple(chunk.offsets)} is not the chunk "
                f"of shape {tuple(chunk.sizes)} that .metadata lists: the checkpoint is damaged"
            )
        # The archive knows no name.
        return StoredTensor(**{**vars(stored), "name": f"{key} at {tuple(chunk.offsets)}"}).read()

    def _check_sizes(self) -> None:
        """Chunks must cover each tensor exactly, and lie inside their files."""
        for key, entry in self._stored.items():
            # Overlaps would count twice and hide a hole; megatron-core checks for them when it saves.
            covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
            if covered != entry.size.numel():
                raise ValueError(
                    f"{self.path}: the chunks of tensor {key} hold {covered} numbers, its shape "
                    f"{tuple(entry.size)} needs {entry.size.numel()}: the checkpoint is damaged"
                )
        for index, info in self._infos():
            if index.fqn in self._stored and info.offset + info.length > self._files[info.relative_path].size:
                raise ValueError(
                    f"{self.path / info.relative_path} is truncated: it has "
                    f"{self._files[info.relative_path].size} bytes, tensor {index.fqn} needs "
                    f"{info.offset + info.length}; copy it again"
                )


def _read_metadata(path: Path) -> Metadata:
    # A pickle that torch loads without restriction: docs/checkpoints.md says whom to take one from.
    try:
        return FileSystemReader(str(path)).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path / '.metadata'} is damaged ({error}): copy the checkpoint again") from error


def _open_file(folder: Path, file: Path) -> MappedFile:
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks {file.name}, which its .metadata lists: copy it again")
    return MappedFile(file)


def native_key(parameter: Parameter) -> str:
    """megatron-core's name of a parameter: all layers share one."""
    return parameter.name.replace(f"layers.{parameter.layer}.", "layers.")


def stacked_shape(parameter: Parameter, model: ModelConfig) -> tuple[int, ...]:
    """Shape under that name: layers lie along the first axis."""
    return parameter.shape if parameter.layer is None else (model.num_layers, *parameter.shape)
