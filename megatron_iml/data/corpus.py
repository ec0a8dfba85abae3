"""The tokenised corpus: documents of one source sequence and one or more target sequences, mapped from disk.

    corpus/train/manifest.json   tokenizer, tasks with their ranges of documents, shards with their digests
    corpus/train/shard-00000.bin, shard-00000.idx, ...          see corpus_format.py

How text becomes tokens: encoding.py. Reading needs no tokenizer.

Suffixes: D documents, S sequences, L tokens of one document.
"""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.corpus_format import Shard, UInt16
from megatron_iml.data.manifest import MANIFEST, read_manifest

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
        self._shards = shards
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
        shard = self._shards[number]
        local = document - self._first_documents[number]
        return shard, int(shard.boundaries_D[local]), int(shard.boundaries_D[local + 1])

    def num_references(self, document: int) -> int:
        """Return how many targets a document has; 1 for one without a source."""
        _, first, stop = self._locate(document)
        return max(stop - first - 1, 1)

    def reference_length(self, document: int, reference: int) -> int:
        """Return the tokens of one target, its `</s>` included."""
        shard, first, stop = self._locate(document)
        return int(shard.sizes_S[first if stop - first == 1 else first + 1 + reference])

    def tokens(self, document: int, reference: int) -> tuple[UInt16, int]:
        """Return source and target of a document, a uint16 copy [L], and how many of them are source."""
        shard, first, stop = self._locate(document)
        if stop - first == 1:
            assert reference == 0, f"document {document} is one sequence, it has no reference {reference}"
            return shard.read(first, first), 0
        assert reference < stop - first - 1, f"document {document} has no reference {reference}"
        return shard.read(first, first + 1 + reference), int(shard.sizes_S[first])

    @cached_property
    def source_lengths_D(self) -> NDArray[np.int32]:
        """Tokens of every document's source, int32 [D]; 0 where there is none."""
        return np.concatenate([_source_lengths(shard) for shard in self._shards])

    @cached_property
    def num_references_D(self) -> NDArray[np.int32]:
        """Targets of every document, int32 [D]."""
        counts = [np.diff(shard.boundaries_D).astype(np.int32) for shard in self._shards]
        return np.maximum(np.concatenate(counts) - 1, 1)

    def reference_lengths(
        self, documents: NDArray[np.int64], references: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """Return the tokens of one target of each document named, int32, `</s>` included."""
        lengths = np.empty(len(documents), dtype=np.int32)
        shard_of = np.searchsorted(self._first_documents, documents, side="right") - 1
        for number in np.unique(shard_of).tolist():
            shard, here = self._shards[number], shard_of == number
            local = documents[here] - self._first_documents[number]
            first = shard.boundaries_D[local]
            has_source = shard.boundaries_D[local + 1] - first > 1
            lengths[here] = shard.sizes_S[first + np.where(has_source, 1 + references[here], 0)]
        return lengths


def _source_lengths(shard: Shard) -> NDArray[np.int32]:
    # One sequence alone is a target: pretraining text has no source.
    has_source = np.diff(shard.boundaries_D) > 1
    return np.where(has_source, shard.sizes_S[shard.boundaries_D[:-1]], 0).astype(np.int32)
