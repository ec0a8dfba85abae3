"""Checks a corpus from end to end: mapped files enter, a line for everything wrong leaves.

    list(corpus_faults(corpus))        [] or ["shard-00000: document 7: a target does not end with id 2"]

A fault names the first place of its kind in a stretch of documents. Every byte is read once, in stretches, so
memory stays small; a corpus of 20 GB takes as long as its SHA-256.

Suffixes: D documents, S sequences and T tokens of a stretch, K tasks.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.corpus.format import TOKEN_BYTES, Shard

STRETCH = 1 << 15

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]


def first_true(wrong: Bools) -> int | None:
    """Where the first fault is, None without one."""
    return int(wrong.argmax()) if wrong.any() else None


def digest_faults(path: Path, expected: str) -> Iterator[str]:
    """Yield a line if a file's SHA-256 is not the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        yield f"{path.name}: SHA-256 is {found}, the manifest says {expected}"


def corpus_faults(corpus: Corpus) -> Iterator[str]:
    """Yield what is wrong with a corpus: digests, structure, ids, ends of targets, numbers of every task."""
    vocab_size, eos_id = (corpus.manifest["tokenizer"][key] for key in ("vocab_size", "eos_id"))
    stops_K = np.array([task.stop_document for task in corpus.task_records])
    starts_K = np.array([task.first_document for task in corpus.task_records])
    if starts_K[0] != 0 or stops_K[-1] != corpus.num_documents or (starts_K[1:] != stops_K[:-1]).any():
        yield f"the tasks do not cover documents 0 to {corpus.num_documents} one after another"
        return
    sums = np.zeros((2, len(stops_K)), dtype=np.int64)
    first_document, sound = 0, True
    for shard, record in zip(corpus.shards, corpus.manifest["shards"], strict=True):
        stem = corpus.folder / record["name"]
        for kind in ("bin", "idx"):
            # Goes on after a wrong digest: what follows says where the bytes differ from what they should be.
            yield from digest_faults(stem.with_suffix(f".{kind}"), record[f"{kind}_sha256"])
        for start in range(0, shard.num_documents, STRETCH):
            stop = min(start + STRETCH, shard.num_documents)
            faults = list(_stretch_faults(shard, start, stop, vocab_size, eos_id))
            yield from (f"{record['name']}: {fault}" for fault in faults)
            sound = sound and not faults
            if sound:
                task_D = np.searchsorted(stops_K, first_document + np.arange(start, stop), side="right")
                for total_K, tokens_D in zip(sums, _document_tokens(shard, start, stop), strict=True):
                    total_K += np.bincount(task_D, tokens_D, minlength=len(stops_K)).astype(np.int64)
        first_document += shard.num_documents
    for task, tokens, sources in zip(corpus.task_records, *sums.tolist(), strict=True):
        # Sums that lack a stretch would blame every task.
        if sound and (tokens, tokens - sources) != (task.tokens, task.target_tokens):
            yield (
                f"{task.name}: holds {tokens} tokens, {tokens - sources} of them targets; the manifest says "
                f"{task.tokens} and {task.target_tokens}"
            )


def _stretch_faults(shard: Shard, start: int, stop: int, vocab_size: int, eos_id: int) -> Iterator[str]:
    bounds_D = shard.boundaries_D[start : stop + 1]
    if (bad := first_true(np.diff(bounds_D) < 1)) is not None:
        yield f"document {start + bad} has no sequence"
        return
    here = slice(int(bounds_D[0]), int(bounds_D[-1]))
    sizes_S, pointers_S = shard.sizes_S[here].astype(np.int64), shard.pointers_S[here]
    stops_S = pointers_S + sizes_S * TOKEN_BYTES
    # The sequence before the stretch counts too, or two stretches might lie apart.
    before = here.start - 1
    end = int(shard.pointers_S[before]) + int(shard.sizes_S[before]) * TOKEN_BYTES if here.start else 0
    expected_S = np.concatenate(([end], stops_S[:-1]))
    if (bad := first_true((pointers_S != expected_S) | (sizes_S < 1))) is not None:
        yield f"sequence {here.start + bad} does not begin where the one before it ends, or is empty"
        return
    # They lie end to end, as is known by now, so one cut holds them all.
    tokens_T = shard.tokens_T[end // TOKEN_BYTES : int(stops_S[-1]) // TOKEN_BYTES]
    if (bad := first_true(tokens_T >= vocab_size)) is not None:
        yield f"id {tokens_T[bad]} in documents {start} to {stop}, the vocabulary has {vocab_size}"
    # All but the sources: those that begin a document of several sequences.
    is_target_S = np.ones(len(sizes_S), dtype=np.bool_)
    is_target_S[(bounds_D[:-1] - bounds_D[0])[np.diff(bounds_D) > 1]] = False
    ends_S = tokens_T[np.cumsum(sizes_S) - 1]
    if (bad := first_true(is_target_S & (ends_S != eos_id))) is not None:
        document = int(np.searchsorted(bounds_D, here.start + bad, side="right")) - 1
        yield f"document {start + document}: a target does not end with id {eos_id}"


def _document_tokens(shard: Shard, start: int, stop: int) -> tuple[Int64, Int64]:
    """Return the tokens of every document and those of its source."""
    bounds_D = shard.boundaries_D[start : stop + 1]
    sizes_S = shard.sizes_S[int(bounds_D[0]) : int(bounds_D[-1])].astype(np.int64)
    firsts_D = bounds_D[:-1] - bounds_D[0]
    # Every document has a sequence, as has been checked: reduceat would give one without its neighbour's.
    return np.add.reduceat(sizes_S, firsts_D), np.where(np.diff(bounds_D) > 1, sizes_S[firsts_D], 0)
