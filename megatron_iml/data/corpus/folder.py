"""The tokenised corpus: documents of one source sequence and one or more target sequences, mapped from disk.

    corpus/train/manifest.json   tokenizer, tasks with their ranges of documents, shards with their digests
    corpus/train/shard-00000.bin, shard-00000.idx, ...          see format.py

How text becomes tokens: encoding.py. Reading needs no tokenizer.

Suffixes: N documents asked for, S sequences, L tokens of one document.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.corpus.format import Shard, UInt16
from megatron_iml.data.manifest import MANIFEST, read_manifest

Int64 = NDArray[np.int64]

FORMAT_VERSION = 1
MANIFEST_KEYS = frozenset({"format_version", "fingerprint", "origin", "tokenizer", "shards", "tasks"})


@dataclass(frozen=True, slots=True)
class CorpusTask:
    """One task of a corpus: its names, its documents [first, stop) and what was stored for it."""

    name: str
    """Unique: `<benchmark>__<category>__<task>`, the name of its bench file."""
    task: str
    benchmark: str
    category: str
    level: str
    examples: int
    first_document: int
    stop_document: int
    tokens: int
    """All stored tokens, every reference included."""
    target_tokens: int
    """Those of target sequences."""

    @property
    def documents(self) -> range:
        """The documents of the task."""
        return range(self.first_document, self.stop_document)


def canonical_digest(value: object) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys."""
    # Sorted, since the same content may come from a dictionary of another order.
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


class Corpus:
    """A tokenised corpus on disk. Opening maps the shards and reads none; `tokens` hands out copies."""

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_sha256: str = manifest["tokenizer"]["sha256"]
        self.padded_vocab_size: int = manifest["tokenizer"]["padded_vocab_size"]
        self.task_records = tuple(CorpusTask(**task) for task in manifest["tasks"])
        self.tasks = {task.name: task.documents for task in self.task_records}
        self.shards = shards
        # A list, and the end of the last shard in it: a bisection on it is far quicker than on a short array.
        self._first_documents = np.cumsum([0] + [shard.num_documents for shard in shards]).tolist()
        self.num_documents: int = self._first_documents[-1]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open corpus/<split>.

        Raises FileNotFoundError for what is absent, ValueError for what was cut short or changed.
        """
        manifest = read_manifest(folder, "corpus", FORMAT_VERSION, MANIFEST_KEYS, "build_corpus.py")
        # The fingerprint cannot cover itself.
        content = {key: value for key, value in manifest.items() if key != "fingerprint"}
        if canonical_digest(content) != manifest["fingerprint"]:
            raise ValueError(
                f"{folder / MANIFEST} was changed after it was written: its fingerprint differs; remove "
                f"{folder} and build it anew with tools/preprocess/build_corpus.py"
            )
        # Their sizes are checked as they are mapped; digests are the business of corpus_faults, being slow.
        shards = [Shard(folder / shard["name"]) for shard in manifest["shards"]]
        for shard, record in zip(shards, manifest["shards"], strict=True):
            if (shard.num_documents, len(shard.sizes_S)) != (record["documents"], record["sequences"]):
                raise ValueError(
                    f"{folder / record['name']}.idx holds {shard.num_documents} documents, the manifest says "
                    f"{record['documents']}; remove {folder} and build it anew with "
                    "tools/preprocess/build_corpus.py"
                )
        return cls(folder, manifest, shards)

    def _locate(self, document: int) -> tuple[Shard, int, int]:
        """Return the shard of a document and its sequences [first, stop) there."""
        assert 0 <= document < self.num_documents, f"document {document} of {self.num_documents}"
        number = bisect_right(self._first_documents, document) - 1
        shard = self.shards[number]
        local = document - self._first_documents[number]
        return shard, int(shard.boundaries_D[local]), int(shard.boundaries_D[local + 1])

    def num_references(self, document: int) -> int:
        """Return how many targets a document has; 1 for one without a source."""
        _, first, stop = self._locate(document)
        # A document of one sequence has no source: what it has is its target.
        return max(stop - first - 1, 1)

    def tokens(self, document: int, reference: int) -> tuple[UInt16, int]:
        """Return source and target of a document, a uint16 copy [L], and how many of them are source."""
        shard, first, stop = self._locate(document)
        if stop - first == 1:
            assert reference == 0, f"document {document} is one sequence, it has no reference {reference}"
            return shard.read(first, first), 0
        assert reference < stop - first - 1, f"document {document} has no reference {reference}"
        return shard.read(first, first + 1 + reference), int(shard.sizes_S[first])

    def _boundaries(self, documents_N: Int64) -> Iterator[tuple[Shard, NDArray[np.bool_], Int64, Int64]]:
        """Yield each shard with which of the documents it holds, and their first and last sequences there."""
        # The last edge is the number of documents, beyond all of them, so it names no shard.
        shard_of_N = np.searchsorted(self._first_documents, documents_N, side="right") - 1
        # Shard by shard: a window's documents come from all of them, and each is indexed once.
        for number in np.unique(shard_of_N).tolist():
            shard, here_N = self.shards[number], shard_of_N == number
            local = documents_N[here_N] - self._first_documents[number]
            yield shard, here_N, shard.boundaries_D[local], shard.boundaries_D[local + 1] - 1

    def reference_counts(self, documents_N: Int64) -> Int64:
        """Return how many targets each of these documents has, int64 [N]."""
        counts_N = np.empty(len(documents_N), dtype=np.int64)
        for _, here_N, first, last in self._boundaries(documents_N):
            # `last - first` is all sequences but the source.
            counts_N[here_N] = np.maximum(last - first, 1)
        return counts_N

    def lengths(self, documents_N: Int64, references_N: Int64) -> tuple[Int64, Int64]:
        """Return the tokens of the source (0: none) and of one target of each document, both int64 [N].

        Of the documents named only: arrays over a whole corpus would grow with it, in every process.
        """
        sources_N, targets_N = np.zeros((2, len(documents_N)), dtype=np.int64)
        for shard, here_N, first, last in self._boundaries(documents_N):
            # One sequence alone is a target: pretraining text has no source.
            has_source = last > first
            sources_N[here_N] = np.where(has_source, shard.sizes_S[first], 0)
            # References are counted behind the source, and nothing is counted where there is none.
            targets_N[here_N] = shard.sizes_S[first + np.where(has_source, 1 + references_N[here_N], 0)]
        return sources_N, targets_N
