"""Reads what `torch.save` wrote, without running it: tensors stay in the file, foreign classes become stubs.

    saved = read_archive(MappedFile(Path("reshard-model_part-0.pt")))
    saved["model"]["decoder.layers.0.fc1.weight"]      ->  StoredTensor
    saved["cfg"].state["_content"]                     ->  whatever an OmegaConf node held, as plain data

A pickle is a program. metaseq's name classes of OmegaConf, argparse and metaseq, which weights_only refuses
and which must not be imported: here they become `Stub`s, which hold data and do nothing. Any other name, such
as os.system, is refused. The archive is a zip, whose checksums are compared as tensors are read.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch

from .stored_tensor import MappedFile, StoredTensor

STUBBED_PACKAGES = frozenset({"metaseq", "fairseq", "fairscale", "omegaconf", "argparse", "numpy", "typing"})
"""Packages whose names become stubs: what training checkpoints of metaseq carry beside tensors."""
# What pickled configurations name beside those packages' classes. As stubs even calls of them do nothing.
STUBBED_NAMES = frozenset(
    {
        ("builtins", "object"),
        ("builtins", "type"),
        ("builtins", "tuple"),
        ("builtins", "bytes"),
        ("builtins", "dict"),
        ("builtins", "list"),
        ("builtins", "set"),
        ("builtins", "int"),
        ("builtins", "float"),
        ("builtins", "str"),
        ("builtins", "bool"),
        ("collections", "defaultdict"),
        ("collections", "Counter"),
        ("copyreg", "_reconstructor"),
        ("enum", "Enum"),
        ("pathlib", "PosixPath"),
        ("_codecs", "encode"),
        ("torch", "device"),
    }
)
# torch says a tensor's type by the class of its storage.
DTYPES_OF_STORAGES: dict[str, torch.dtype] = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LOCAL_HEADER_BYTES = 30
"""Before its name and extra field, whose lengths are at 26 and 28 (APPNOTE 4.3.7)."""
DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
)
"""What `zipfile` and `pickle` raise for bytes that are not what was written."""


PYTHON_2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Protocol 2, which torch writes, still has these."""


class RefusedPickle(ValueError):
    """A pickle that names what may not be loaded."""


class Stub:
    """Stands for an object of a class that is not imported: keeps what the pickle gave it, does nothing."""

    def __new__(cls, *arguments: Any) -> "Stub":
        """Here rather than in `__init__`, which the pickle may leave out."""
        stub = super().__new__(cls)
        stub.arguments, stub.state = arguments, None
        stub.items, stub.elements = {}, []
        return stub

    arguments: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]
    elements: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """One element of a list that the object was."""
        self.elements.append(value)

    def extend(self, values: list[Any]) -> None:
        """Elements of a list that the object was."""
        self.elements.extend(values)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


class _Window(io.RawIOBase):
    """A part of a mapped file as a file of its own, for `zipfile`."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view, self._position = view, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, from the start, the position or the end."""
        self._position = (0, self._position, len(self._view))[whence] + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Copy bytes at the position."""
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


class _Unpickler(pickle.Unpickler):
    """Builds StoredTensors and Stubs only."""

    def __init__(self, data: bytes, archive: "_Archive") -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global that the pickle names."""
        module = PYTHON_2_NAMES.get(module, module)
        # Called with the storage's place and the tensor's shape: nothing is read yet.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._archive.tensor
        # A parameter is its tensor here: requires_grad and hooks mean nothing in a file of weights.
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _first
        # State dicts are these; the class runs nothing of the pickle's.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        # A storage's class says its type, and nothing else of it is needed.
        if module == "torch" and name in DTYPES_OF_STORAGES:
            return DTYPES_OF_STORAGES[name]
        # A dtype, pickled by its name.
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        # By package: which of their classes a training run pickled depends on its options.
        if module.split(".")[0] in STUBBED_PACKAGES or (module, name) in STUBBED_NAMES:
            return Stub
        raise RefusedPickle(
            f"{self._archive.file.path} holds a pickle that names {module}.{name}, which is neither a tensor "
            "nor part of a training configuration: refused, since loading it could run foreign code"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: its type, its record and its length."""
        # ("storage", what `find_class` gave for its class, record, where it was, numbers)
        _, dtype, key, _, numel = pid
        return _Storage(dtype, key, numel)


def _first(tensor: StoredTensor, *arguments: Any) -> StoredTensor:
    return tensor


class _Archive:
    """The zip inside a file, and where the bytes of its records lie."""

    def __init__(self, file: MappedFile, start: int, num_bytes: int) -> None:
        self.file, self.start = file, start
        self.zip = zipfile.ZipFile(_Window(file.view(start, num_bytes)))
        names = self.zip.namelist()
        # The folder inside the archive bears the file's first name, whatever the file is called now.
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} records called data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        """The object, with StoredTensors for tensors."""
        # zipfile compares the CRC-32 of what it reads; of tensors, which are mapped, StoredTensor does.
        return _Unpickler(self.zip.read(self.root + "data.pkl"), self).load()

    def tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *ignored: Any) -> StoredTensor:
        """Stands for torch's `_rebuild_tensor_v2`."""
        info = self.zip.getinfo(f"{self.root}data/{storage.key}")
        num_bytes = storage.numel * storage.dtype.itemsize
        # It could not be mapped; torch never compresses.
        if info.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"record {info.filename} is compressed")
        if info.file_size != num_bytes:
            raise zipfile.BadZipFile(
                f"record {info.filename} holds {info.file_size} bytes, its storage has {num_bytes}"
            )
        # Shape and strides come from the pickle: with wrong ones a view would reach beyond its record.
        # Without numbers there is nothing to reach for; a scalar, without sizes, has one.
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if min(shape, default=1) > 0 and last >= storage.numel:
            raise zipfile.BadZipFile(f"a tensor of shape {tuple(shape)} exceeds its record {info.filename}")
        start = self._data_offset(info)
        if start + num_bytes > self.file.size:
            raise zipfile.BadZipFile(f"record {info.filename} ends beyond the file")
        return StoredTensor(
            name=info.filename,
            file=self.file,
            offset=start,
            num_bytes=num_bytes,
            dtype=storage.dtype,
            shape=tuple(shape),
            crc32=info.CRC,
            stride=tuple(stride),
            storage_offset=offset,
        )

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        # The directory does not say how long the local header is: torch pads it so that data is aligned.
        header = self.start + info.header_offset
        lengths = self.file.view(header + 26, 4)
        name_length, extra_length = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
        return header + LOCAL_HEADER_BYTES + name_length + extra_length


def read_archive(file: MappedFile, start: int = 0, num_bytes: int | None = None) -> Any:
    """What was saved, with a `StoredTensor` in place of each tensor; nothing of the tensors is read.

    Args:
        file: the file, or the file that holds the archive.
        start: where in it the archive begins.
        num_bytes: its length; None for the rest of the file.

    Raises:
        ValueError: if the archive is truncated or damaged, or its pickle names what may not be loaded.
    """
    length = file.size - start if num_bytes is None else num_bytes
    try:
        return _Archive(file, start, length).load()
    # A ValueError too, and the reader must learn that it was refused, not that it is damaged.
    except RefusedPickle:
        raise
    except DAMAGE as error:
        raise ValueError(
            f"{file.path} is truncated, damaged or not written by torch 1.6 or newer ({error}): copy it "
            f"again; it has {file.size} bytes"
        ) from error


def named(tensors: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a state dict, each told its name; other entries are left out."""
    return {
        name: replace(tensor, name=name)
        for name, tensor in tensors.items()
        if isinstance(tensor, StoredTensor)
    }
