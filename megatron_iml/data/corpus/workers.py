"""Encodes the pieces of bench files in worker processes, and gives them back in order.

What enters: pieces of a few MiB (`bench/chunks.py`). What leaves: their documents as token ids, in the order
of the files, so that the bytes of a corpus do not depend on the number of workers and memory does not grow.

    pieces of 2.0, 2.0 and 1.1 MiB  ->  FlatDocuments of 2,400, 2,390 and 1,300 documents
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import orjson

from megatron_iml.data.bench.chunks import Chunk
from megatron_iml.data.bench.folder import BenchFile
from megatron_iml.data.corpus.encoding import FlatDocuments, encode_flat_documents
from megatron_iml.data.corpus.tokenizer import Backend, Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class EncodedChunk:
    """The documents of a chunk, ready to be written."""

    entry: BenchFile
    examples: int
    documents: FlatDocuments


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer) -> EncodedChunk:
    """Parse and encode a chunk; raise ValueError with file and line for a row that is not one."""
    examples = []
    # Not splitlines: it also cuts at a carriage return.
    lines = chunk.data.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=chunk.first_line):
        try:
            row = orjson.loads(line)
            # `references` holds `tgt` too, as its first; it is there only where there are several.
            examples.append((row["src"], row.get("references") or [row["tgt"]]))
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{chunk.path}:{number}: got {line[:60]!r}, expected an object with src and tgt "
                f"({error!r}); build the bench anew"
            ) from error
    documents = encode_flat_documents(tokenizer, examples)
    return EncodedChunk(chunk.entry, len(examples), documents)


def encode_in_order(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, folder: Path, pool: ProcessPoolExecutor | None, ahead: int
) -> Iterator[EncodedChunk]:
    """Encode chunks in the pool, or here without one, at most `ahead` of them before the one yielded.

    Workers load `tokenizer` anew from its `folder`.
    """
    if pool is None:
        for chunk in chunks:
            yield encode_chunk(chunk, tokenizer)
        return
    waiting: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        # Read here and sent: the digest of a file needs its bytes in order, so one process reads it.
        waiting.append(pool.submit(_encode_in_worker, chunk, folder, tokenizer.backend))
        # Bounded, or a fast reader would hold the whole bench in memory.
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


@cache
def _tokenizer_of_worker(folder: Path, backend: Backend) -> Tokenizer:
    """Load a tokenizer once per worker, which cannot be sent one with every chunk."""
    return Tokenizer.load(folder, backend)


def _encode_in_worker(chunk: Chunk, folder: Path, backend: Backend) -> EncodedChunk:
    # In workers alone, which end with their build: the folder may hold another tokenizer at the next one.
    return encode_chunk(chunk, _tokenizer_of_worker(folder, backend))
