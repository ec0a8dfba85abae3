"""A bench file in pieces of whole lines: what its rows are read in where there are millions of them.

    train/A__B__c.jsonl, 5.1 MiB  ->  pieces of 2.0, 2.0 and 1.1 MiB

A file is hashed while it is read: one that is not what its manifest says stops whoever reads it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_iml.data.bench.folder import Bench, BenchFile

# Large enough to hide the cost of sending a chunk, small enough to share a small task out.
CHUNK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a bench file."""

    entry: BenchFile
    path: Path
    first_line: int
    data: bytes


def read_chunks(bench: Bench, entry: BenchFile) -> Iterator[Chunk]:
    """Yield a file in chunks; raise ValueError at its end if its bytes are not those of the manifest."""
    digest = hashlib.sha256()
    path, line = bench.path(entry), 1
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            # To the end of the line that the cut goes through; a whole line more if it goes through none.
            data += file.readline()
            digest.update(data)
            yield Chunk(entry, path, line, data)
            line += data.count(b"\n")
    # Its rows are out by now: nothing made of them may be put in place before the last chunk is asked for.
    if digest.hexdigest() != entry.sha256:
        raise ValueError(
            f"{path} was changed after the bench was built: SHA-256 {digest.hexdigest()}, the manifest says "
            f"{entry.sha256}; build the bench anew"
        )
