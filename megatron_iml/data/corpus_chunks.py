"""Encodes the files of a bench piece by piece, in worker processes and in order.

What enters: bench files with their SHA-256. What leaves: pieces of a few MiB as token ids, in the order of
the files, so that the bytes of a corpus do not depend on the number of workers and memory does not grow.

    train/A__B__c.jsonl, 5.1 MiB  ->  pieces of 2.0, 2.0 and 1.1 MiB, each whole lines
    ->  FlatDocuments of 2,400, 2,390 and 1,300 documents

A file is hashed while it is read: one that is not what its manifest says stops the build.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import orjson

from megatron_iml.data.bench import Bench, BenchFile
from megatron_iml.data.encoding import FlatDocuments, encode_flat_documents
from megatron_iml.data.tokenizer import Backend, Tokenizer

# Large enough to hide the cost of sending a chunk, small enough to share a small task out.
CHUNK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a bench file."""

    entry: BenchFile
    path: Path
    first_line: int
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class EncodedChunk:
    """The documents of a chunk, ready to be written."""

    entry: BenchFile
    examples: int
    documents: FlatDocuments


def read_chunks(bench: Bench, entry: BenchFile) -> Iterator[Chunk]:
    """Yield a file in chunks; raise ValueError at its end if its bytes are not those of the manifest."""
    digest = hashlib.sha256()
    path, line = bench.path(entry), 1
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            data += file.readline()
            digest.update(data)
            yield Chunk(entry, path, line, data)
            line += data.count(b"\n")
    if digest.hexdigest() != entry.sha256:
        raise ValueError(
            f"{path} was changed after the bench was built: SHA-256 {digest.hexdigest()}, the manifest says "
            f"{entry.sha256}; build the bench anew"
        )


def encode_chunk(chunk: Chunk, tokenizer: Path, backend: Backend) -> EncodedChunk:
    """Parse and encode a chunk; raise ValueError with file and line for a row that is not one."""
    examples = []
    # Not splitlines: it also cuts at a carriage return.
    lines = chunk.data.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=chunk.first_line):
        try:
            row = orjson.loads(line)
            examples.append((row["src"], row.get("references") or [row["tgt"]]))
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{chunk.path}:{number}: got {line[:60]!r}, expected an object with src and tgt "
                f"({error!r}); build the bench anew"
            ) from error
    documents = encode_flat_documents(_tokenizer_of_process(tokenizer, backend), examples)
    return EncodedChunk(chunk.entry, len(examples), documents)


def encode_in_order(
    chunks: Iterator[Chunk], tokenizer: Path, backend: Backend, pool: ProcessPoolExecutor | None, ahead: int
) -> Iterator[EncodedChunk]:
    """Encode chunks in the pool, or here without one, at most `ahead` of them before the one yielded."""
    if pool is None:
        for chunk in chunks:
            yield encode_chunk(chunk, tokenizer, backend)
        return
    waiting: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode_chunk, chunk, tokenizer, backend))
        # Bounded, or a fast reader would hold the whole bench in memory.
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


@cache
def _tokenizer_of_process(folder: Path, backend: Backend) -> Tokenizer:
    """Load a tokenizer once per process: a worker cannot be sent one with every chunk."""
    return Tokenizer.load(folder, backend)
