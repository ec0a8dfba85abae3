"""Checks a plan from end to end: mapped files enter, a line for everything wrong leaves.

    list(plan_faults(plan, corpus))    [] or ["row 12: 2049 slots in a row of 2048"]

A fault names the first place of its kind in a stretch of rows. Every entry is read once, in stretches, so
memory does not grow with the plan.

Suffixes: D documents of the corpus, E entries and R rows of a stretch, K tasks.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.corpus.validation import digest_faults, first_true
from megatron_iml.data.plan.draws import Lengths
from megatron_iml.data.plan.folder import Plan

STRETCH_ROWS = 1 << 12

Int64 = NDArray[np.int64]


def plan_faults(plan: Plan, corpus: Corpus) -> Iterator[str]:
    """Yield what is wrong with a plan: digests, every entry against the corpus, sums of rows, the ledger."""
    for name, record in plan.manifest["files"].items():
        yield from digest_faults(plan.folder / f"{name}.npy", record["sha256"])
    if (np.diff(plan.row_starts) < 1).any() or plan.row_starts[0] != 0:
        yield "row_starts does not rise from 0"
        return
    tally = {
        name: np.zeros(len(corpus.task_records), dtype=np.int64)
        for name in ("packed", "truncated", "tokens", "target_tokens", "shared_tokens")
    }
    # A document of a small task with a large proportion may come more than 65,535 times.
    times_D = np.zeros(corpus.num_documents, dtype=np.uint32)
    for start in range(0, plan.num_rows, STRETCH_ROWS):
        rows = range(start, min(start + STRETCH_ROWS, plan.num_rows))
        entries = plan.entries_E[plan.row_starts[rows.start] : plan.row_starts[rows.stop]]
        row_E = np.repeat(np.array(rows), np.diff(plan.row_starts[rows.start : rows.stop + 1]))
        faults = list(_entry_faults(plan, corpus, entries, row_E))
        yield from faults
        # Sums over entries that point nowhere would blame whatever they hit.
        if not faults:
            yield from _row_faults(plan, corpus, entries, row_E, tally)
            # Not `times_D[...] += 1`, which counts a document once however often it comes in the stretch.
            np.add.at(times_D, entries["document"], 1)
    yield from _ledger_faults(plan, corpus, tally, times_D)


def _lengths(plan: Plan, corpus: Corpus, entries: NDArray[np.void]) -> Lengths:
    documents, references = (entries[name].astype(np.int64) for name in ("document", "reference"))
    # As PackingConfig.limit has it, from what the plan says of itself.
    limit = min(plan.row_length, plan.max_positions) + 1
    return Lengths(*corpus.lengths(documents, references), limit)


def _entry_faults(plan: Plan, corpus: Corpus, entries: NDArray[np.void], row_E: Int64) -> Iterator[str]:
    documents, references = (entries[name].astype(np.int64) for name in ("document", "reference"))
    if (bad := first_true(documents >= corpus.num_documents)) is not None:
        yield f"row {row_E[bad]}: document {documents[bad]}, the corpus has {corpus.num_documents}"
        return
    if (bad := first_true(references >= corpus.reference_counts(documents))) is not None:
        yield f"row {row_E[bad]}: document {documents[bad]} has no reference {references[bad]}"
        return
    lengths = _lengths(plan, corpus, entries)
    wrong = ~lengths.kept_N | (entries["cut"] != lengths.cut_N) | (entries["length"] != lengths.length_N)
    if (bad := first_true(wrong)) is not None:
        yield (
            f"row {row_E[bad]}: document {documents[bad]} has length {entries['length'][bad]} after a cut of "
            f"{entries['cut'][bad]}, expected {lengths.length_N[bad]} and {lengths.cut_N[bad]}"
        )
    shared, trunk = entries["shared"].astype(np.int64), entries["trunk"].astype(np.int64)
    # row_E ascends, so that a search for each row in itself finds where the row begins.
    place_E = np.arange(len(entries)) - np.searchsorted(row_E, row_E)
    # What a document shares, it shares with the one before it; no document stores its last token.
    before_E = np.concatenate(([0], lengths.length_N[:-1] - 1))
    hangs = (trunk == place_E - 1) & (trunk >= 0) & (shared <= np.minimum(before_E, lengths.length_N - 1))
    if (bad := first_true(np.where(shared > 0, ~hangs, trunk != -1))) is not None:
        yield (
            f"row {row_E[bad]}: document {documents[bad]} shares {shared[bad]} tokens with entry {trunk[bad]}"
        )
        return
    # The trunk is the entry before, as has been checked above.
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
    # No row is empty, as row_starts has been found to rise, so every row of the stretch starts somewhere.
    starts_R = np.flatnonzero(np.diff(row_E, prepend=-1))
    rows = slice(int(row_E[0]), int(row_E[-1]) + 1)
    for what, stored_R, values_E in (
        ("slots", plan.slots_R[rows], last_E - shared),
        ("targets", plan.targets_R[rows], lengths.num_targets_N),
        ("pairs", plan.pairs_R[rows], pairs_E),
    ):
        sums_R = np.add.reduceat(values_E, starts_R)
        if (bad := first_true(sums_R != stored_R)) is not None:
            yield f"row {rows.start + bad}: {sums_R[bad]} {what}, the plan says {stored_R[bad]}"
        if what == "slots" and (bad := first_true(sums_R > plan.row_length)) is not None:
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
    plan: Plan, corpus: Corpus, tally: dict[str, Int64], times_D: NDArray[np.uint32]
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
        # Dropped documents count as drawn: the bound holds for those that are left.
        # Nothing comes twice before everything came once.
        most = -(-line["drawn"] // max(line["documents"], 1))
        times = int(times_D[task.first_document : task.stop_document].max(initial=0))
        if times > most:
            yield f"{task.name}: a document comes {times} times, {line['drawn']} draws allow {most}"
