"""Small benches, and small corpora written token by token for tests that need no tokenizer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import orjson

from megatron_iml.data.corpus.build import BuildConfig, build_corpus
from megatron_iml.data.corpus.folder import FORMAT_VERSION, Corpus, CorpusTask, canonical_digest
from megatron_iml.data.corpus.format import ShardWriter
from megatron_iml.data.plan.build import build_plan
from megatron_iml.data.plan.folder import Plan
from megatron_iml.data.plan.packing import PackingConfig

# Rows of a bench by file: several references, a source that ends in a line break, none at all.
ROWS = {
    "ALPHA__Sums__plus": [
        {"id": f"p{i}", "src": f"What is {i} + {i}?\nAnswer:", "tgt": f"{2 * i}"} for i in range(40)
    ],
    "ALPHA__Words__pairs__many": [
        {"id": "w0", "src": "A pair:", "tgt": "one two", "references": ["one two", "two one", "1 2 "]},
        {"id": "w1", "src": "Blank line\n", "tgt": "\nwell", "references": ["\nwell", "done", "\n\nyes"]},
        {"id": "w2", "src": "Trailing blanks  ", "tgt": "fine"},
    ],
    "PLAIN__Text__replay": [{"id": "r0", "src": "", "tgt": "Once upon a time. The answer is 7."}],
}


def write_bench(folder: Path, rows: dict[str, list[dict]], split: str = "train") -> Path:
    """Write a bench of one split and return its folder."""
    (folder / split).mkdir(parents=True)
    files = []
    for name, examples in rows.items():
        benchmark, category, task = name.split("__", 2)
        data = "".join(json.dumps(row) + "\n" for row in examples).encode()
        (folder / split / f"{name}.jsonl").write_bytes(data)
        files.append(
            {
                "task": task,
                "benchmark": benchmark,
                "category": category,
                "level": "fully_supervised",
                "split": split,
                "examples": len(examples),
                "metric": "rouge_l",
                "sha256": sha256(data).hexdigest(),
                "file": f"{split}/{name}.jsonl",
                "parent": "",
            }
        )
    manifest = {"format_version": 2, "seed": 1, "splits": {}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# A document is its sequences: source and references, or one that is all target.
Document = Sequence[Sequence[int]]


def lengths_document(source: int, *references: int, first_id: int = 10) -> Document:
    """A document of the given lengths whose ids are distinct within it and end with 2."""
    sequences = [list(range(first_id, first_id + source))] if source else []
    for number, length in enumerate(references):
        start = first_id + source + 100 * number
        sequences.append([*range(start, start + length - 1), 2])
    return sequences


def random_documents(rng: np.random.Generator, count: int) -> list[Document]:
    """Documents of 1 to 4 references; some too long for 64 slots, some without a source, some empty texts."""
    documents: list[Document] = [lengths_document(0, 1), lengths_document(0, 66), lengths_document(3, 65)]
    for _ in range(count - len(documents)):
        source = int(rng.integers(0, 90))
        references = rng.integers(1 if source else 2, 12, size=rng.integers(1, 5) if source else 1).tolist()
        documents.append(lengths_document(source, *references))
    return documents


def write_corpus(
    folder: Path, tasks: Mapping[str, Sequence[Document]], levels: Mapping[str, str] | None = None
) -> Corpus:
    """Write documents of tasks named `<benchmark>__<category>__<task>` as one shard and open the corpus."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder / "shard-00000", vocab_size=1 << 16)
    records, first = [], 0
    for name, documents in tasks.items():
        for document in documents:
            ids = np.array([i for sequence in document for i in sequence], dtype=np.uint16)
            sizes = np.array([len(sequence) for sequence in document], dtype=np.int32)
            writer.write(ids, sizes, np.array([len(document)], dtype=np.int32))
        benchmark, category, task = name.split("__", 2)
        level = (levels or {}).get(name, "fully_supervised")
        stop = first + len(documents)
        tokens = sum(len(sequence) for document in documents for sequence in document)
        sources = sum(len(document[0]) for document in documents if len(document) > 1)
        record = CorpusTask(
            name, task, benchmark, category, level, len(documents), first, stop, tokens, tokens - sources
        )
        records.append(asdict(record))
        first = stop
    return _open_written(folder, writer, records)


def _open_written(folder: Path, writer: ShardWriter, records: list[dict]) -> Corpus:
    content = {
        "format_version": FORMAT_VERSION,
        "origin": {},
        "tokenizer": {"sha256": "", "vocab_size": 1 << 16, "padded_vocab_size": 1 << 16, "eos_id": 2},
        "shards": [{"name": "shard-00000", **asdict(writer.close())}],
        "tasks": records,
    }
    manifest = {"fingerprint": canonical_digest(content), **content}
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    return Corpus.open(folder)


def write_lengths(folder: Path, tasks: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Corpus:
    """Write documents of which only the lengths matter, source and target of each, and open the corpus."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder / "shard-00000", vocab_size=1 << 16)
    records, first = [], 0
    for name, (sources, targets) in tasks.items():
        sizes = np.stack([sources, targets], axis=1).astype(np.int32).ravel()
        counts = 1 + (np.asarray(sources) > 0).astype(np.int32)
        writer.write(np.full(sizes.sum(), 10, dtype=np.uint16), sizes[sizes > 0], counts)
        benchmark, category, task = name.split("__", 2)
        stop, total, target = first + len(counts), int(sizes.sum()), int(np.sum(targets))
        level = "fully_supervised"
        record = CorpusTask(name, task, benchmark, category, level, len(counts), first, stop, total, target)
        records.append(asdict(record))
        first = stop
    return _open_written(folder, writer, records)


def plan_of(corpus: Corpus, config: PackingConfig, folder: Path, workers: int = 1) -> Plan:
    """Build a plan without anyone watching, and open it."""
    build_plan(corpus, config, folder, lambda documents, total: None, workers)
    return Plan.open(folder)


def build(config: BuildConfig) -> Corpus:
    """Build a corpus without anyone watching, and open it."""
    build_corpus(config, start=lambda examples: None, advance=lambda examples, tokens: None)
    return Corpus.open(config.output / config.split)
