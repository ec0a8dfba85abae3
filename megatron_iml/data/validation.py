"""Checks a corpus and a plan from end to end: mapped files enter, a line for everything wrong leaves.

    list(corpus_faults(corpus))        [] or ["shard-00000: document 7: a target does not end with id 2"]
    list(plan_faults(plan, corpus))    [] or ["row 12: 2049 slots in a row of 2048"]

A fault names the first place of its kind in a stretch of documents or rows. Every byte is read once, in
stretches, so memory stays small; a corpus of 20 GB takes as long as its SHA-256.

Suffixes: D documents, S sequences, E entries and R rows of a stretch, K tasks.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus import Corpus
from megatron_iml.data.corpus_format import TOKEN_BYTES, Shard
from megatron_iml.data.draws import Lengths
from megatron_iml.data.plan import Plan

STRETCH = 1 << 15

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]


def _first(wrong: Bools) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


def _digest_faults(path: Path, expected: str) -> Iterator[str]:
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
            yield from _digest_faults(stem.with_suffix(f".{kind}"), record[f"{kind}_sha256"])
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
    if (bad := _first(np.diff(bounds_D) < 1)) is not None:
        yield f"document {start + bad} has no sequence"
        return
    here = slice(int(bounds_D[0]), int(bounds_D[-1]))
    sizes_S, pointers_S = shard.sizes_S[here].astype(np.int64), shard.pointers_S[here]
    stops_S = pointers_S // TOKEN_BYTES + sizes_S
    if (bad := _first((stops_S[:-1] * TOKEN_BYTES != pointers_S[1:]) | (sizes_S[1:] < 1))) is not None:
        yield f"sequence {here.start + bad + 1} does not begin where the one before it ends, or is empty"
        return
    tokens_T = shard.tokens_T[int(pointers_S[0]) // TOKEN_BYTES : int(stops_S[-1])]
    if (bad := _first(tokens_T >= vocab_size)) is not None:
        yield f"id {tokens_T[bad]} in documents {start} to {stop}, the vocabulary has {vocab_size}"
    # All but the sources: those that begin a document of several sequences.
    is_target_S = np.ones(len(sizes_S), dtype=np.bool_)
    is_target_S[(bounds_D[:-1] - bounds_D[0])[np.diff(bounds_D) > 1]] = False
    ends_S = tokens_T[np.cumsum(sizes_S) - 1]
    if (bad := _first(is_target_S & (ends_S != eos_id))) is not None:
        document = int(np.searchsorted(bounds_D, here.start + bad, side="right")) - 1
        yield f"document {start + document}: a target does not end with id {eos_id}"


def _document_tokens(shard: Shard, start: int, stop: int) -> tuple[Int64, Int64]:
    """Return the tokens of every document and those of its source."""
    bounds_D = shard.boundaries_D[start : stop + 1]
    sizes_S = shard.sizes_S[int(bounds_D[0]) : int(bounds_D[-1])].astype(np.int64)
    firsts_D = bounds_D[:-1] - bounds_D[0]
    return np.add.reduceat(sizes_S, firsts_D), np.where(np.diff(bounds_D) > 1, sizes_S[firsts_D], 0)


def plan_faults(plan: Plan, corpus: Corpus) -> Iterator[str]:
    """Yield what is wrong with a plan: digests, every entry against the corpus, sums of rows, the ledger."""
    for name, record in plan.manifest["files"].items():
        yield from _digest_faults(plan.folder / f"{name}.npy", record["sha256"])
    if (np.diff(plan.row_starts) < 1).any() or plan.row_starts[0] != 0:
        yield "row_starts does not rise from 0"
        return
    tally = {
        name: np.zeros(len(corpus.task_records), dtype=np.int64)
        for name in ("packed", "truncated", "tokens", "target_tokens", "shared_tokens")
    }
    times_D = np.zeros(corpus.num_documents, dtype=np.uint16)
    for start in range(0, plan.num_rows, STRETCH // 8):
        rows = range(start, min(start + STRETCH // 8, plan.num_rows))
        entries = plan.entries_E[plan.row_starts[rows.start] : plan.row_starts[rows.stop]]
        row_E = np.repeat(np.array(rows), np.diff(plan.row_starts[rows.start : rows.stop + 1]))
        faults = list(_entry_faults(plan, corpus, entries, row_E))
        yield from faults
        if not faults:
            yield from _row_faults(plan, corpus, entries, row_E, tally)
            np.add.at(times_D, entries["document"], 1)
    yield from _ledger_faults(plan, corpus, tally, times_D)


def _lengths(plan: Plan, corpus: Corpus, entries: NDArray[np.void]) -> Lengths:
    documents, references = (entries[name].astype(np.int64) for name in ("document", "reference"))
    limit = min(plan.row_length, plan.max_positions) + 1
    return Lengths(*corpus.lengths(documents, references), limit)


def _entry_faults(plan: Plan, corpus: Corpus, entries: NDArray[np.void], row_E: Int64) -> Iterator[str]:
    documents, references = (entries[name].astype(np.int64) for name in ("document", "reference"))
    if (bad := _first(documents >= corpus.num_documents)) is not None:
        yield f"row {row_E[bad]}: document {documents[bad]}, the corpus has {corpus.num_documents}"
        return
    if (bad := _first(references >= corpus.reference_counts(documents))) is not None:
        yield f"row {row_E[bad]}: document {documents[bad]} has no reference {references[bad]}"
        return
    lengths = _lengths(plan, corpus, entries)
    wrong = ~lengths.kept_N | (entries["cut"] != lengths.cut_N) | (entries["length"] != lengths.length_N)
    if (bad := _first(wrong)) is not None:
        yield (
            f"row {row_E[bad]}: document {documents[bad]} has length {entries['length'][bad]} after a cut of "
            f"{entries['cut'][bad]}, expected {lengths.length_N[bad]} and {lengths.cut_N[bad]}"
        )
    shared, trunk = entries["shared"].astype(np.int64), entries["trunk"].astype(np.int64)
    place_E = np.arange(len(entries)) - np.searchsorted(row_E, row_E)
    # What a document shares, it shares with the one before it; no document stores its last token.
    before_E = np.concatenate(([0], lengths.length_N[:-1] - 1))
    hangs = (trunk == place_E - 1) & (trunk >= 0) & (shared <= np.minimum(before_E, lengths.length_N - 1))
    if (bad := _first(np.where(shared > 0, ~hangs, trunk != -1))) is not None:
        yield (
            f"row {row_E[bad]}: document {documents[bad]} shares {shared[bad]} tokens with entry {trunk[bad]}"
        )
        return
    for branch in np.flatnonzero(shared).tolist():
        one, other = (
            corpus.tokens(int(entries["document"][e]), int(entries["reference"][e]))[0][entries["cut"][e] :][
                : shared[branch]
            ]
            for e in (branch - 1, branch)
        )
        if not np.array_equal(one, other):
            yield f"row {row_E[branch]}: document {documents[branch]} differs from its trunk where they share"


def _row_faults(
    plan: Plan, corpus: Corpus, entries: NDArray[np.void], row_E: Int64, tally: dict[str, Int64]
) -> Iterator[str]:
    """Compare the sums of every row, and add the entries to the tally of their tasks."""
    lengths, shared = _lengths(plan, corpus, entries), entries["shared"].astype(np.int64)
    last_E = lengths.length_N - 1
    pairs_E = (last_E * (last_E + 1) - shared * (shared + 1)) // 2
    starts_R = np.flatnonzero(np.diff(row_E, prepend=-1))
    rows = slice(int(row_E[0]), int(row_E[-1]) + 1)
    for what, stored_R, values_E in (
        ("slots", plan.slots_R[rows], last_E - shared),
        ("targets", plan.targets_R[rows], lengths.num_targets_N),
        ("pairs", plan.pairs_R[rows], pairs_E),
    ):
        sums_R = np.add.reduceat(values_E, starts_R)
        if (bad := _first(sums_R != stored_R)) is not None:
            yield f"row {rows.start + bad}: {sums_R[bad]} {what}, the plan says {stored_R[bad]}"
        if what == "slots" and (bad := _first(sums_R > plan.row_length)) is not None:
            yield f"row {rows.start + bad}: {sums_R[bad]} slots in a row of {plan.row_length}"
    stops_K = np.array([task.stop_document for task in corpus.task_records])
    task_E = np.searchsorted(stops_K, entries["document"], side="right")
    for name, values_E in (
        ("packed", np.ones(len(entries))),
        ("truncated", entries["cut"] > 0),
        ("tokens", lengths.length_N),
        ("target_tokens", lengths.num_targets_N),
        ("shared_tokens", shared),
    ):
        tally[name] += np.bincount(task_E, values_E, minlength=len(stops_K)).astype(np.int64)


def _ledger_faults(
    plan: Plan, corpus: Corpus, tally: dict[str, Int64], times_D: NDArray[np.uint16]
) -> Iterator[str]:
    for k, task in enumerate(corpus.task_records):
        line: dict[str, Any] | None = plan.ledger.get(task.name)
        if line is None:
            if tally["packed"][k]:
                yield f"{task.name}: {tally['packed'][k]} documents, but the ledger has no such task"
            continue
        for name, counts_K in tally.items():
            if line[name] != counts_K[k]:
                yield f"{task.name}: {counts_K[k]} {name}, the ledger says {line[name]}"
        if line["drawn"] != line["packed"] + sum(line["dropped"].values()):
            yield f"{task.name}: the ledger does not close: {line}"
        # Nothing comes twice before everything came once.
        most = -(-line["drawn"] // max(line["documents"], 1))
        times = int(times_D[task.first_document : task.stop_document].max(initial=0))
        if times > most:
            yield f"{task.name}: a document comes {times} times, {line['drawn']} draws allow {most}"
