"""Tokenises one split of a bench into a corpus: JSON lines enter, shards and a manifest leave.

Lines are read in chunks of a few MiB, encoded by worker processes and written in their order by this one, so
memory is flat in the number of documents and the bytes do not depend on the number of workers. A shard is a
run of whole tasks with its own record; a build that was killed keeps its finished shards and redoes the rest.

    bench/train/NIV2__Misc.__task1146.jsonl, 2 rows, one with 3 references
      ->  2 documents, 6 sequences, and in the manifest {"name": "NIV2__Misc.__task1146", "examples": 2,
          "first_document": 0, "stop_document": 2, ...}

Suffixes: T tokens, S sequences, D documents of one chunk.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.bench import Bench, BenchFile
from megatron_iml.data.corpus import FORMAT_VERSION, Corpus, CorpusTask, canonical_digest
from megatron_iml.data.corpus_format import ShardWriter, UInt16
from megatron_iml.data.encoding import encode_documents
from megatron_iml.data.manifest import MANIFEST
from megatron_iml.data.splits import Split
from megatron_iml.data.tokenizer import Backend, Tokenizer

# Large enough to hide the cost of sending a chunk, small enough to share a small task out.
CHUNK_BYTES = 2 << 20
# What a killed build loses at most; more and smaller files would slow network file systems.
SHARD_EXAMPLES = 1 << 20
# Rows of every file on which the fast encoder is compared with `tokenizers`, and their number in all.
VERIFY_ROWS_PER_FILE = 8
VERIFY_ROWS = 2000


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """What a corpus is built from, and how."""

    bench: Path
    split: Split
    tokenizer: Path
    output: Path
    """Folder of the corpus; the split becomes a folder in it."""
    backend: Backend = "gigatoken"
    workers: int = 1
    shard_examples: int = SHARD_EXAMPLES


@dataclass(frozen=True, slots=True)
class _Chunk:
    path: str
    first_line: int
    lines: list[bytes]


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    """The documents of a chunk, ready to be written."""

    ids_T: UInt16
    sizes_S: NDArray[np.int32]
    counts_D: NDArray[np.int32]
    examples: int
    target_tokens: int


@cache
def _worker_tokenizer(folder: Path, backend: Backend) -> Tokenizer:
    """Load a tokenizer once per process: a worker cannot be sent one with every chunk."""
    return Tokenizer.load(folder, backend)


def _die_with_parent() -> None:
    """End this worker when the building process is gone; one killed outright cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker follows a parent"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _parse(chunk: _Chunk) -> list[tuple[str, list[str]]]:
    examples = []
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        try:
            row = orjson.loads(line)
            source, targets = row["src"], row.get("references") or [row["tgt"]]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{chunk.path}:{number}: got {line[:60]!r}, expected an object with src and tgt "
                f"({error!r}); build the bench anew"
            ) from error
        examples.append((source, targets))
    return examples


def _encode_chunk(chunk: _Chunk, folder: Path, backend: Backend) -> _Encoded:
    examples = _parse(chunk)
    sequences: list[UInt16] = []
    counts: list[int] = []
    target_tokens = 0
    for documents in encode_documents(_worker_tokenizer(folder, backend), examples):
        for document in documents:
            sequences.extend(document.sequences)
            counts.append(len(document.sequences))
            target_tokens += sum(map(len, document.targets))
    sizes_S = np.fromiter(map(len, sequences), dtype=np.int32, count=len(sequences))
    return _Encoded(
        np.concatenate(sequences), sizes_S, np.array(counts, dtype=np.int32), len(examples), target_tokens
    )


def _read_chunks(path: Path) -> Iterator[_Chunk]:
    with path.open("rb") as file:
        line = 1
        while lines := file.readlines(CHUNK_BYTES):
            yield _Chunk(str(path), line, lines)
            line += len(lines)


def _encode_in_order(
    chunks: Iterator[tuple[BenchFile, _Chunk]], config: BuildConfig, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[BenchFile, _Encoded]]:
    """Encode chunks in the pool, at most two per worker ahead of the one being written."""
    if pool is None:
        for entry, chunk in chunks:
            yield entry, _encode_chunk(chunk, config.tokenizer, config.backend)
        return
    waiting: deque[tuple[BenchFile, Future[_Encoded]]] = deque()
    for entry, chunk in chunks:
        waiting.append((entry, pool.submit(_encode_chunk, chunk, config.tokenizer, config.backend)))
        # Bounded, or a fast reader would hold the whole bench in memory.
        if len(waiting) > 2 * config.workers:
            first, future = waiting.popleft()
            yield first, future.result()
    for entry, future in waiting:
        yield entry, future.result()


def group_into_shards(entries: list[BenchFile], shard_examples: int) -> list[list[BenchFile]]:
    """Group whole tasks, in their order, until a shard has `shard_examples` or more."""
    shards: list[list[BenchFile]] = []
    # Full before the first task, so that it opens the first shard.
    held = shard_examples
    for entry in entries:
        if held >= shard_examples:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.examples
    return shards


def _write_shard(
    stem: Path,
    entries: list[BenchFile],
    tokenizer: Tokenizer,
    encoded: Iterator[tuple[BenchFile, _Encoded]],
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write one shard; return its record, documents of tasks counted from the shard's first."""
    writer = ShardWriter(stem, tokenizer.vocab_size)
    totals = {
        entry.file: dict.fromkeys(("examples", "documents", "tokens", "target_tokens"), 0)
        for entry in entries
    }
    for entry, chunk in encoded:
        writer.write(chunk.ids_T, chunk.sizes_S, chunk.counts_D)
        total = totals[entry.file]
        total["examples"] += chunk.examples
        total["documents"] += len(chunk.counts_D)
        total["tokens"] += len(chunk.ids_T)
        total["target_tokens"] += chunk.target_tokens
        advance(chunk.examples, len(chunk.ids_T))
    for entry in entries:
        if totals[entry.file]["examples"] != entry.examples:
            raise ValueError(
                f"{entry.file} has {totals[entry.file]['examples']} rows, the bench manifest says "
                f"{entry.examples}; build the bench anew"
            )
    return {"shard": {"name": stem.name, **asdict(writer.close())}, "totals": totals}


def _number_tasks(entries: list[BenchFile], records: list[dict[str, Any]]) -> list[CorpusTask]:
    totals = {file: total for record in records for file, total in record["totals"].items()}
    tasks, first = [], 0
    for entry in entries:
        total = totals[entry.file]
        tasks.append(
            CorpusTask(
                name=entry.stem,
                task=entry.task,
                benchmark=entry.benchmark,
                category=entry.category,
                level=entry.level,
                examples=total["examples"],
                first_document=first,
                stop_document=first + total["documents"],
                tokens=total["tokens"],
                target_tokens=total["target_tokens"],
            )
        )
        first += total["documents"]
    return tasks


def _verify_tokenizer(bench: Bench, entries: list[BenchFile], tokenizer: Tokenizer) -> int:
    """Compare the fast encoder with `tokenizers` on rows of every task, spread over all of them."""
    # Every n-th task, so that the sample of 1,600 tasks is no larger than one of 250.
    stride = max(1, len(entries) * VERIFY_ROWS_PER_FILE // VERIFY_ROWS)
    texts = []
    for entry in entries[::stride]:
        for row in islice(bench.rows(entry), VERIFY_ROWS_PER_FILE):
            texts.append(f"{row['src'].rstrip(' ')} {row['tgt'].rstrip()}")
    return tokenizer.verify(texts)


def _write_json(path: Path, value: object) -> None:
    """Write a file that is either whole or absent."""
    # Renamed at the end: what is read back after a kill is never half a file.
    partial = path.with_suffix(".partial")
    partial.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    partial.replace(path)


def build_corpus(
    config: BuildConfig, start: Callable[[int], None], advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Build corpus/<split> and return its manifest; what an earlier run finished is kept.

    `start` hears the number of examples once, `advance` the examples and tokens of every chunk written, or
    found written. Raises FileNotFoundError or ValueError for a missing or malformed bench, an unsuitable
    tokenizer, or an output folder built from something else.
    """
    bench = Bench.open(config.bench)
    entries = bench.files(config.split)
    if not entries:
        raise ValueError(f"{config.bench} has no files of split {config.split!r}; it has {_splits(bench)}")
    tokenizer = Tokenizer.load(config.tokenizer, config.backend)
    folder = config.output / config.split
    folder.mkdir(parents=True, exist_ok=True)
    # Not the backend and the workers: they change no byte.
    origin = {
        "bench_fingerprint": bench.fingerprint,
        "split": config.split,
        "tokenizer_sha256": tokenizer.sha256,
        "shard_examples": config.shard_examples,
    }
    start(sum(entry.examples for entry in entries))
    finished = _finished_manifest(folder, origin)
    if finished is not None:
        return finished
    _verify_tokenizer(bench, entries, tokenizer)

    shards = group_into_shards(entries, config.shard_examples)
    records: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")  # a fork would copy gigatoken's threads half-alive
    pool = ProcessPoolExecutor(config.workers, context, _die_with_parent) if config.workers > 1 else None
    try:
        for number, group in enumerate(shards):
            stem = folder / f"shard-{number:05d}"
            record = _finished_record(stem, origin)
            if record is None:
                chunks = ((entry, chunk) for entry in group for chunk in _read_chunks(bench.path(entry)))
                encoded = _encode_in_order(chunks, config, pool)
                record = {"origin": origin, **_write_shard(stem, group, tokenizer, encoded, advance)}
                _write_json(stem.with_suffix(".json"), record)
            else:
                advance(sum(entry.examples for entry in group), record["shard"]["tokens"])
            records.append(record)
    finally:
        if pool is not None:
            # After an error too: workers would go on with chunks that nobody waits for.
            pool.shutdown(cancel_futures=True)
    return _write_manifest(folder, origin, tokenizer, _number_tasks(entries, records), records)


def _write_manifest(
    folder: Path,
    origin: dict[str, Any],
    tokenizer: Tokenizer,
    tasks: list[CorpusTask],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    content = {
        "format_version": FORMAT_VERSION,
        "origin": origin,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "padded_vocab_size": tokenizer.padded_vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "shards": [record["shard"] for record in records],
        "tasks": [asdict(task) for task in tasks],
    }
    manifest = {"fingerprint": canonical_digest(content), **content}
    _write_json(folder / MANIFEST, manifest)
    for record in records:  # only a build that is under way needs them
        (folder / record["shard"]["name"]).with_suffix(".json").unlink()
    return manifest


def _splits(bench: Bench) -> str:
    return ", ".join(sorted({entry.split for entry in bench.files()})) or "none"


def _finished_record(stem: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of a shard that an earlier run finished from the same inputs."""
    path = stem.with_suffix(".json")
    if not path.is_file():
        return None
    record = orjson.loads(path.read_bytes())
    return record if record["origin"] == origin else None


def _finished_manifest(folder: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    if not (folder / MANIFEST).is_file():
        return None
    # Opened whole: a shard that went missing since must not pass for finished.
    manifest = Corpus.open(folder).manifest
    if manifest["origin"] != origin:
        raise ValueError(
            f"{folder} holds a corpus built from {manifest['origin']}, now asked for {origin}; "
            "remove it or choose another output folder"
        )
    return manifest
