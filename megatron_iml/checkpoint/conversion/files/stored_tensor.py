"""Tensors where they lie: a file is mapped, and a tensor is a view on it until somebody copies it.

    file = MappedFile(Path("model.safetensors"))
    tensors = read_safetensors(file, {})                  # {"decoder.fc1.weight": StoredTensor, ...}
    tensors["decoder.fc1.weight"].read()                  # checked, then a view: no memory of this process

Mapped pages belong to the page cache: reading a model of any size costs this process no memory of its own.
"""

import json
import math
import mmap
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself: a larger length is not a header's."""


class MappedFile:
    """A file mapped for reading, and which of its checksums have been compared."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        # An empty file cannot be mapped, and no weight file is that small.
        if self.size < 16:
            raise ValueError(f"{path} has {self.size} bytes: it is no weight file; copy it again")
        with path.open("rb") as file:
            # Read-only: the kernel refuses private writable maps that are larger than memory.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.checked: set[int] = set()

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Bytes of the file, not copied."""
        return memoryview(self.map)[offset : offset + num_bytes]

    def read_ahead(self, offset: int, num_bytes: int) -> None:
        """Ask the kernel for pages in large requests; faults alone bring them in small ones."""
        start = offset - offset % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, start, min(offset + num_bytes, self.size) - start)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Its bytes lie at `offset`; `crc32` is their checksum, where one is recorded."""

    name: str
    file: MappedFile
    offset: int
    num_bytes: int
    """Of the storage, which may be larger than the tensor."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int | None = None
    stride: tuple[int, ...] | None = None
    storage_offset: int = 0

    def read(self) -> Tensor:
        """The tensor as a view on the file, after its checksum was compared once.

        Raises:
            ValueError: if the bytes are not those that were written.
        """
        self.file.read_ahead(self.offset, self.num_bytes)
        # Once a file and place: fused projections and tied heads read a tensor several times.
        if self.crc32 is not None and self.offset not in self.file.checked:
            found = zlib.crc32(self.file.view(self.offset, self.num_bytes))
            if found != self.crc32:
                raise ValueError(
                    f"{self.file.path}: tensor {self.name} is damaged: its bytes have checksum {found:08x}, "
                    f"{self.crc32:08x} was recorded when they were written; copy the file again"
                )
            self.file.checked.add(self.offset)
        numel = self.num_bytes // self.dtype.itemsize
        # `frombuffer` refuses to make a tensor of nothing.
        if numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():
            # torch warns that the map is read-only, which is what we want of a source.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            storage = torch.frombuffer(self.file.map, dtype=self.dtype, count=numel, offset=self.offset)
        if self.stride is None:
            return storage.view(self.shape)
        return torch.as_strided(storage, self.shape, self.stride, self.storage_offset)


def read_safetensors(file: MappedFile, checksums: Mapping[str, int]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; `checksums` are CRC-32 of those that are known.

    Raises:
        ValueError: if the header is none, or the tensors do not fill the file to its last byte.
    """
    length = int.from_bytes(file.view(0, 8), "little")
    # Format: 8 bytes of length, a JSON header of that length, the tensors without gaps.
    begin = 8 + length
    if length > MAX_HEADER_BYTES or begin > file.size:
        raise ValueError(
            f"{file.path}: its header would be {length} bytes long, the file is {file.size}: it is truncated "
            "or no safetensors file; copy it again"
        )
    try:
        header = json.loads(bytes(file.view(8, length)))
        # Under that name is whatever the writer liked to note.
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _entry(file, begin, name, entry, checksums) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.path}: damaged header ({error}); copy the file again") from error
    end = begin
    # No gap, no overlap, nothing left: a header that lies is found before any number is read.
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end or tensor.num_bytes != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise ValueError(
                f"{file.path}: tensor {tensor.name} does not lie where its shape {tensor.shape} says: the "
                "header is damaged; copy the file again"
            )
        end += tensor.num_bytes
    if end != file.size:
        raise ValueError(
            f"{file.path} has {file.size} bytes, its tensors need {end}: the file is "
            f"{'truncated' if file.size < end else 'not what its header says'}; copy it again"
        )
    return tensors


def _entry(
    file: MappedFile, begin: int, name: str, entry: dict[str, Any], checksums: Mapping[str, int]
) -> StoredTensor:
    # They count from the end of the header.
    start, stop = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    return StoredTensor(name, file, begin + start, stop - start, dtype, shape, checksums.get(name))
