"""Files that are whole or absent, whatever moment a job is killed at, and their digests.

write_atomically(Path("out/report.json"), b"{}\\n")     out/report.json.partial, then renamed
sha256_of(Path("out/report.json"))                      "ca3d163bab055381827226140568f3bef7eaac18..."
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 1 << 22


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, force it to disk, rename. The folder must exist; one writer per path."""
    # Beside it, since a rename works on one file system only.
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        # Before the rename: else a crash may leave the name on blocks that were never written.
        os.fsync(file.fileno())
    partial.replace(path)


def force_to_disk(path: Path) -> None:
    """Have a file's content, or a folder's entries, outlive a power cut from here on."""
    # Reading is enough: what is forced is what the system holds, whoever has written it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


class HashingFile:
    """A binary file being written whose SHA-256 is known at the end without reading it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Append; returns the number of bytes."""
        self._file.write(data)
        self._digest.update(data)
        return len(data)

    def tell(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def close(self) -> str:
        """Force everything to disk and return the digest in hexadecimal."""
        self._file.flush()
        # Renaming comes next: a crash must not leave a full name on empty blocks.
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()
