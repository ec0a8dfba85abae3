"""The tokenised corpus: documents of one source sequence and one or more target sequences, mapped from disk.

    corpus/train/manifest.json   tokenizer, tasks with their ranges of documents, shards with their digests
    corpus/train/shard-00000.bin, shard-00000.idx, ...          see corpus_format.py

    "Capital of Togo?\\nAnswer:", ["Lome"]  ->  source [38632 9 255 14744 116 50118 33683 35]
                                            target [226 4399 2]

Text becomes tokens as OPT-IML's trainer made them: blanks at the end of the source and all space at the end
of the target are removed, the two are joined by one space and encoded *together*, the source being the first
`len(encode(source))` of the ids; the target ends with `</s>`. A document without a source (pretraining text)
is one sequence, all target.

Suffixes: D documents, S sequences, L tokens of one document.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.corpus_format import Shard, UInt16
from megatron_iml.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LARGEST_VOCABULARY = 1 << 16  # ids are stored as uint16


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDocument:
    """A document as it is stored: source ids (none: all is target) and targets that end with `</s>`.

    `references[i]` says which of the texts given `targets[i]` encodes.
    """

    source: UInt16
    targets: tuple[UInt16, ...]
    references: tuple[int, ...]

    @property
    def sequences(self) -> tuple[UInt16, ...]:
        """The stored sequences in their order."""
        return (self.source, *self.targets) if len(self.source) else self.targets


def encode_document(tokenizer: Tokenizer, source: str, targets: Sequence[str]) -> list[EncodedDocument]:
    """Encode one example: one document, plus one per reference whose joint encoding changes the source's ids.

    Without a source every target is a document of its own, since a document's first of several sequences is
    its source. The order is that of `targets`.
    """
    return encode_documents(tokenizer, [(source, targets)])[0]


def encode_documents(
    tokenizer: Tokenizer, examples: Sequence[tuple[str, Sequence[str]]]
) -> list[list[EncodedDocument]]:
    """Encode many examples in one batch, each as `encode_document` does."""
    if tokenizer.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} entries, the corpus stores ids as uint16 and "
            f"holds at most {LARGEST_VOCABULARY}; use a smaller vocabulary"
        )
    texts: list[str] = []
    joint: list[bool] = []
    for source, targets in examples:
        source = source.rstrip(" ")
        # After a non-space the space before the target always starts a new word (GPT-2's pattern): no merge
        # crosses the boundary, and encoding the parts apart saves encoding the source twice.
        apart = not source or not source[-1].isspace()
        texts.append(source)
        prefix = " " if apart else source + " "
        texts.extend([prefix + target.rstrip() for target in targets])
        joint.append(not apart)

    pieces = iter(_with_eos(tokenizer, texts))
    documents = []
    for (_, targets), is_joint in zip(examples, joint, strict=True):
        source_ids = next(pieces)[:-1]
        target_ids = [next(pieces) for _ in targets]
        if is_joint:
            documents.append(_split_joint(source_ids, target_ids))
        elif len(source_ids):
            documents.append([EncodedDocument(source_ids, tuple(target_ids), tuple(range(len(target_ids))))])
        else:
            documents.append([EncodedDocument(source_ids, (ids,), (i,)) for i, ids in enumerate(target_ids)])
    return documents


def _split_joint(source: UInt16, joint: Sequence[UInt16]) -> list[EncodedDocument]:
    """Split source + target encodings at the source's own length; group those that keep the source's ids."""
    # At least `</s>` stays a target, even where joining made fewer tokens of everything.
    splits = [min(len(source), len(ids) - 1) for ids in joint]
    kept = [i for i, ids in enumerate(joint) if np.array_equal(ids[: splits[i]], source)]
    documents = [
        EncodedDocument(joint[i][: splits[i]], (joint[i][splits[i] :],), (i,)) for i in range(len(joint))
    ]
    if not kept:
        return documents
    together = EncodedDocument(source, tuple(joint[i][splits[i] :] for i in kept), tuple(kept))
    return [together if i == kept[0] else documents[i] for i in range(len(joint)) if i not in kept[1:]]


def _with_eos(tokenizer: Tokenizer, texts: Sequence[str]) -> list[UInt16]:
    """Encode texts, each with `</s>` at its end; views of one array, so that no ids are copied one by one."""
    ids, offsets = tokenizer.encode_flat(texts)
    stops = offsets[1:] + np.arange(1, len(offsets))
    with_eos = np.empty(len(ids) + len(texts), dtype=np.uint16)
    is_text = np.ones(len(with_eos), dtype=bool)
    is_text[stops - 1] = False
    with_eos[is_text] = ids
    with_eos[stops - 1] = tokenizer.eos_id
    starts = [0, *stops.tolist()]
    return [with_eos[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]


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
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; build it with tools/preprocess/build_corpus.py")
        manifest = orjson.loads(path.read_bytes())
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {manifest.get('format_version')}, expected {FORMAT_VERSION}; "
                "rebuild it with tools/preprocess/build_corpus.py"
            )
        content = {key: value for key, value in manifest.items() if key != "fingerprint"}
        if canonical_digest(content) != manifest["fingerprint"]:
            raise ValueError(
                f"{path} was changed after it was written: its fingerprint differs; rebuild the corpus"
            )
        shards = [Shard(folder / shard["name"]) for shard in manifest["shards"]]
        for shard, record in zip(shards, manifest["shards"], strict=True):
            if (shard.num_documents, len(shard.sizes_S)) != (record["documents"], record["sequences"]):
                raise ValueError(
                    f"{folder / record['name']}.idx holds {shard.num_documents} documents, the manifest says "
                    f"{record['documents']}; rebuild the corpus with tools/preprocess/build_corpus.py"
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
    has_source = np.diff(shard.boundaries_D) > 1
    return np.where(has_source, shard.sizes_S[shard.boundaries_D[:-1]], 0).astype(np.int32)
