"""Tokenises one split of a bench into a corpus: JSON lines enter, shards and a manifest leave.

A shard is a run of whole tasks with its own record, so a build that was killed keeps its finished shards and
redoes the rest, and several jobs can share the shards out. Workers encode (`workers.py`), this process
writes.

    bench/train/NIV2__Misc.__task1146.jsonl, 2 rows, one with 3 references
      ->  2 documents, 6 sequences, and in the manifest {"name": "NIV2__Misc.__task1146", "examples": 2,
          "first_document": 0, "stop_document": 2, ...}
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_iml.data.bench.chunks import read_chunks
from megatron_iml.data.bench.folder import Bench, BenchFile
from megatron_iml.data.bench.splits import Split
from megatron_iml.data.corpus.folder import FORMAT_VERSION, Corpus, CorpusTask, canonical_digest
from megatron_iml.data.corpus.format import ShardWriter
from megatron_iml.data.corpus.tokenizer import Backend, Tokenizer
from megatron_iml.data.corpus.workers import EncodedChunk, encode_in_order
from megatron_iml.data.jobs import WHOLE, Job, claim, finished_record, worker_pool, write_json
from megatron_iml.data.manifest import MANIFEST

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
    job: Job = WHOLE
    """The share of the shards that this process builds; the rest is another's."""


def group_into_shards(entries: list[BenchFile], shard_examples: int) -> list[list[BenchFile]]:
    """Group whole tasks, in their order, until a shard has `shard_examples` or more."""
    shards: list[list[BenchFile]] = []
    # Whole tasks only: a task's documents are then one range of one shard.
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
    encoded: Iterator[EncodedChunk],
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write one shard; return its record, documents of tasks counted from the shard's first."""
    writer = ShardWriter(stem, tokenizer.vocab_size)
    totals = {
        entry.file: dict.fromkeys(("examples", "documents", "tokens", "target_tokens"), 0)
        for entry in entries
    }
    for chunk in encoded:
        documents, total = chunk.documents, totals[chunk.entry.file]
        writer.write(documents.ids_T, documents.sizes_S, documents.counts_D)
        total["examples"] += chunk.examples
        total["documents"] += len(documents.counts_D)
        total["tokens"] += len(documents.ids_T)
        total["target_tokens"] += documents.target_tokens
        advance(chunk.examples, len(documents.ids_T))
    for entry in entries:
        # The bytes are those of the manifest by now; the number beside them may still be another.
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
        # Documents, not examples: references that change the source's ids become documents of their own.
        first += total["documents"]
    return tasks


def _verify_tokenizer(bench: Bench, entries: list[BenchFile], tokenizer: Tokenizer) -> int:
    """Compare the fast encoder with `tokenizers` on rows of every task, spread over all of them."""
    # Every n-th task, so that the sample of 1,600 tasks is no larger than one of 250.
    stride = max(1, len(entries) * VERIFY_ROWS_PER_FILE // VERIFY_ROWS)
    texts = []
    for entry in entries[::stride]:
        for row in islice(bench.rows(entry), VERIFY_ROWS_PER_FILE):
            # Source and target in one, as they are encoded where their parts may merge.
            texts.append(f"{row['src'].rstrip(' ')} {row['tgt'].rstrip()}")
    return tokenizer.verify(texts)


def build_corpus(
    config: BuildConfig, start: Callable[[int], None], advance: Callable[[int, int], None]
) -> dict[str, Any] | None:
    """Build corpus/<split> and return its manifest; what an earlier run or another job finished is kept.

    One job of several returns None: the manifest is written by a run of the whole after them. `start` hears
    the number of examples once, `advance` the examples and tokens of every chunk written, or found written.
    Raises FileNotFoundError or ValueError for a missing, changed or malformed bench, an unsuitable tokenizer,
    or an output folder built from something else.
    """
    bench = Bench.open(config.bench)
    entries = bench.files(config.split)
    if not entries:
        raise ValueError(f"{config.bench} has no files of split {config.split!r}; it has {_splits(bench)}")
    tokenizer = Tokenizer.load(config.tokenizer, config.backend)
    folder = config.output / config.split
    folder.mkdir(parents=True, exist_ok=True)
    # Not the backend, the workers and the job: they change no byte.
    origin = {
        "bench_fingerprint": bench.fingerprint,
        "split": config.split,
        "tokenizer_sha256": tokenizer.sha256,
        "shard_examples": config.shard_examples,
    }
    shards = group_into_shards(entries, config.shard_examples)
    mine = [(number, group) for number, group in enumerate(shards) if config.job.owns(number)]
    start(sum(entry.examples for _, group in mine for entry in group))
    with claim(folder, shared=config.job.is_share):
        # Under the claim, or another process could finish between the look and the work.
        finished = _finished_manifest(folder, origin)
        if finished is not None:
            return finished
        _verify_tokenizer(bench, entries, tokenizer)
        records = _build_shards(config, bench, tokenizer, origin, mine, advance)
        if config.job.is_share:
            return None
        return _write_manifest(folder, origin, tokenizer, _number_tasks(entries, records), records)


def _build_shards(
    config: BuildConfig,
    bench: Bench,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    shards: list[tuple[int, list[BenchFile]]],
    advance: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Write the numbered shards that are not there yet; return the records of all of them."""
    records: list[dict[str, Any]] = []
    with worker_pool(config.workers) as pool:
        for number, group in shards:
            stem = config.output / config.split / f"shard-{number:05d}"
            record = finished_record(stem.with_suffix(".json"), origin)
            if record is None:
                # Jobs share the folder, so each shard needs a holder of its own: SLURM may start a job twice.
                with claim(stem):
                    chunks = (chunk for entry in group for chunk in read_chunks(bench, entry))
                    # Two for each worker: one that it works on and one that waits.
                    ahead = 2 * config.workers
                    encoded = encode_in_order(chunks, tokenizer, config.tokenizer, pool, ahead)
                    record = {"origin": origin, **_write_shard(stem, group, tokenizer, encoded, advance)}
                    # Last: the record says that both files stand whole under their names.
                    write_json(stem.with_suffix(".json"), record)
            else:
                advance(sum(entry.examples for entry in group), record["shard"]["tokens"])
            records.append(record)
    return records


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
        # What a run must know of it: neither packing nor training reads the tokenizer itself.
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "padded_vocab_size": tokenizer.padded_vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "shards": [record["shard"] for record in records],
        "tasks": [asdict(task) for task in tasks],
    }
    # Over the digests of all shards, and so over every token.
    manifest = {"fingerprint": canonical_digest(content), **content}
    write_json(folder / MANIFEST, manifest)
    for record in records:  # only a build that is under way needs them
        (folder / record["shard"]["name"]).with_suffix(".json").unlink()
    return manifest


def _splits(bench: Bench) -> str:
    return ", ".join(sorted({entry.split for entry in bench.files()})) or "none"


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
