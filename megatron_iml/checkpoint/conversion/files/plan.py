"""Weight files as they will be, before a single weight is read: fixed bytes, and gaps for the tensors.

    plan = safetensors_file({"a": TensorSpec(torch.float16, (2, 3)), "b": ...})
    plan.size, plan.frames, plan.records["a"].offset

With sizes known beforehand a file is made at its full length and tensors are written into their gaps one at a
time, in any order; a conversion that was killed goes on where it stopped. `torch_archive` gives the zip that
`torch.save` writes; its checksums are patched in when a record is complete.
"""

import io
import json
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .stored_tensor import SAFETENSORS_DTYPES

ALIGNMENT = 64
ZIP32_LIMIT = 0xFFFFFFFF
# The classes that torch.save names for a type; without one here a type cannot be written.
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.int64: torch.LongStorage,
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor still to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = "tensor"
    """Its record's, in `torch_archive`."""

    @property
    def num_bytes(self) -> int:
        """Its length in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Record:
    """The gap of one tensor, and the places in the file that hold its CRC-32."""

    offset: int
    num_bytes: int
    crc_offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class FilePlan:
    """A file: its length, its fixed bytes and where they go, and its gaps by name."""

    size: int
    frames: tuple[tuple[int, bytes], ...]
    records: Mapping[str, Record]


def safetensors_file(tensors: Mapping[str, TensorSpec]) -> FilePlan:
    """A safetensors file of these tensors, in their order."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in tensors.items():
        offsets = [end, end + spec.num_bytes]
        header[name] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    # Blanks up to the alignment, as the library writes them: tensors are mapped in place.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    frame = len(text).to_bytes(8, "little") + text
    records = {
        name: Record(len(frame) + header[name]["data_offsets"][0], spec.num_bytes)
        for name, spec in tensors.items()
    }
    return FilePlan(len(frame) + end, ((0, frame),), records)


class _StorageReference:
    """Stands for a storage in a pickle."""

    def __init__(self, key: int, spec: TensorSpec) -> None:
        self.key, self.spec = key, spec


class _Pickler(pickle.Pickler):
    """Pickles an object as `torch.save` would, each TensorSpec as the tensor it describes."""

    def __init__(self, file: io.BytesIO) -> None:
        # torch.save's own protocol, which every reader of its files knows.
        super().__init__(file, protocol=2)
        self.specs: list[TensorSpec] = []

    def reducer_override(self, value: Any) -> Any:
        """A call that rebuilds the tensor, for a TensorSpec."""
        if not isinstance(value, TensorSpec):
            return NotImplemented
        reference = _StorageReference(len(self.specs), value)
        self.specs.append(value)
        # torch's own strides for such a shape, sizes of 0 and 1 among them.
        stride = torch.empty(value.shape, device="meta").stride()
        # (storage, offset in it, shape, stride, requires_grad, backward hooks)
        arguments: Any = (reference, 0, value.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value: Any) -> Any:
        """A storage by its record's number."""
        if not isinstance(value, _StorageReference):
            return None
        spec = value.spec
        # The tuple that torch.load takes apart; "cpu" is where it would put the tensor.
        return ("storage", STORAGES[spec.dtype], str(value.key), "cpu", math.prod(spec.shape))


def torch_archive(value: Any) -> FilePlan:
    """The file `torch.save` would write of `value`, whose TensorSpecs are gaps called by their names."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    # Records and their order as torch.save writes them: data.pkl first, `version` last.
    zip_plan = _ZipPlan()
    zip_plan.add_bytes("archive/data.pkl", stream.getvalue())
    zip_plan.add_bytes("archive/byteorder", b"little")
    for number, spec in enumerate(pickler.specs):
        zip_plan.add_record(f"archive/data/{number}", spec.name, spec.num_bytes)
    zip_plan.add_bytes("archive/version", b"3\n")
    return zip_plan.finish()


def side_by_side(plans: Mapping[str, FilePlan]) -> FilePlan:
    """One file of several, end to end; records are called by the plan's name."""
    frames: list[tuple[int, bytes]] = []
    records: dict[str, Record] = {}
    end = 0
    for name, plan in plans.items():
        frames += [(end + offset, data) for offset, data in plan.frames]
        for record in plan.records.values():
            crc_offsets = tuple(end + offset for offset in record.crc_offsets)
            records[name] = replace(record, offset=end + record.offset, crc_offsets=crc_offsets)
        end += plan.size
    return FilePlan(end, tuple(frames), records)


class _ZipPlan:
    """Lays out an uncompressed zip archive (APPNOTE 4.3; ZIP64 where a size or a place needs it)."""

    def __init__(self) -> None:
        self.end = 0
        self.frames: list[tuple[int, bytes]] = []
        self.records: dict[str, Record] = {}
        self.directory: list[bytes] = []

    def add_bytes(self, path: str, data: bytes) -> None:
        """A record whose content is known."""
        _, after = self._add(path, len(data), zlib.crc32(data))
        self.frames.append((after, data))

    def add_record(self, path: str, name: str, num_bytes: int) -> None:
        """A gap."""
        header, after = self._add(path, num_bytes, 0)
        # CRCs lie 14 bytes into a local header and 16 into an entry of the directory (APPNOTE 4.3.7, 4.3.12).
        # The directory comes last: until `finish` knows where, the second place is the entry's number.
        self.records[name] = Record(after, num_bytes, (header + 14, len(self.directory) - 1))

    def _add(self, path: str, num_bytes: int, crc: int) -> tuple[int, int]:
        """Append a local header; returns where it begins and where the data begins."""
        start, name = self.end, path.encode()
        large = num_bytes >= ZIP32_LIMIT
        size = ZIP32_LIMIT if large else num_bytes
        extra = struct.pack("<HHQQ", 1, 16, num_bytes, num_bytes) if large else b""
        # Tensors begin at multiples of 64, so that a mapped file can be viewed as numbers in place: after 30
        # bytes of header, the name, and 4 bytes before the padding itself.
        padding = -(start + 30 + len(name) + len(extra) + 4) % ALIGNMENT
        # torch's own padding field.
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        # APPNOTE 4.4.3: 4.5 knows ZIP64, 2.0 is everybody's. 0x21 is 1 January 1980, the first date there is.
        version = 45 if large else 20
        fields = (version, 0, 0, 0, 0x21, crc, size, size, len(name), len(extra))
        header = b"PK\3\4" + struct.pack("<HHHHHIIIHH", *fields) + name + extra
        self.frames.append((start, header))
        self.end = start + len(header) + num_bytes
        self.directory.append(_directory_entry(name, num_bytes, crc, start))
        return start, start + len(header)

    def finish(self) -> FilePlan:
        """Append the directory."""
        starts = [self.end]
        for entry in self.directory:
            starts.append(starts[-1] + len(entry))
        size, count = starts[-1] - starts[0], len(self.directory)
        large = starts[-1] >= ZIP32_LIMIT
        tail = b"".join(self.directory)
        # ZIP64's own end of the directory, and a locator that says where it is; the old end follows.
        if large:
            # 44: what follows the size field itself. 45: the version of the format that knows ZIP64.
            fields64 = (44, 45, 45, 0, 0, count, count, size, starts[0])
            tail += b"PK\6\6" + struct.pack("<QHHIIQQQQ", *fields64)
            tail += b"PK\6\7" + struct.pack("<IQI", 0, starts[-1], 1)
        # Two bytes hold the count, which a state dict of an OPT stays far below.
        assert count < 0xFFFF, f"{count} records in one archive"
        fields = (0, 0, count, count, size, ZIP32_LIMIT if large else starts[0], 0)
        tail += b"PK\5\6" + struct.pack("<HHHHIIH", *fields)
        records = {
            name: replace(record, crc_offsets=(record.crc_offsets[0], starts[record.crc_offsets[1]] + 16))
            for name, record in self.records.items()
        }
        return FilePlan(starts[0] + len(tail), (*self.frames, (starts[0], tail)), records)


def _directory_entry(name: bytes, num_bytes: int, crc: int, start: int) -> bytes:
    # Only what does not fit 32 bits goes into the extra field, in this order (APPNOTE 4.5.3).
    large, far = num_bytes >= ZIP32_LIMIT, start >= ZIP32_LIMIT
    wide = ([num_bytes, num_bytes] if large else []) + ([start] if far else [])
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, version = (ZIP32_LIMIT if large else num_bytes), (45 if wide else 20)
    place = ZIP32_LIMIT if far else start
    fields = (version, version, 0, 0, 0, 0x21, crc, size, size, len(name), len(extra), 0, 0, 0, 0, place)
    return b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", *fields) + name + extra
