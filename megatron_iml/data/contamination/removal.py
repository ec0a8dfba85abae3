"""Removes from a bench what its decision file says: another bench leaves, the first stays as it is.

What enters: a bench, the findings in it (`search.py`) and their decisions. What leaves: a bench
without the rows or tasks that go, whose ledger says how many went and why.

    remove_training_examples on (A__D__trivia, test/B__C__quiz.jsonl)
    ->  train/A__D__trivia.jsonl without the rows that hold an n-gram which is specific to rows of the quiz;
        ledger: "dropped": {"shares words with an evaluation example": 12}

Templates never make a row go: an instruction in common is no leak.
"""

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.bench.folder import LEDGER, Bench, BenchFile, manifest_bytes
from megatron_iml.data.bench.splits import near
from megatron_iml.data.bench.staging import put_in_place, working_folder
from megatron_iml.data.contamination.ngrams import NgramHasher
from megatron_iml.data.contamination.report import DECISION_FILE, DECISIONS
from megatron_iml.data.contamination.search import Findings, open_findings, rows_with_ngrams
from megatron_iml.data.manifest import MANIFEST
from megatron_iml.data.text_files import json_object, yaml_mapping

TRAINING_REASON = "shares words with an evaluation example"
EVALUATION_REASON = "shares words with a training example"
TASK_REASON = "task removed: it shares words with another split"
DECISION_KEYS = {"training", "evaluation", "rows", "shared", "specific", "decision"}

Decision = tuple[BenchFile, BenchFile, str]


def load_decisions(path: Path, bench: Bench) -> list[Decision]:
    """Training file, evaluation file and decision of every pair of a decision file.

    Raises ValueError for a file made for another bench, an unknown name or decision.
    """
    content = yaml_mapping(path)
    if set(content) != {"bench_fingerprint", "pairs"} or not isinstance(content["pairs"], list):
        raise ValueError(
            f"{path}: got the keys {sorted(content)}, expected bench_fingerprint and a list pairs"
        )
    if content["bench_fingerprint"] != bench.fingerprint:
        raise ValueError(f"{path} was made for another bench than {bench.folder}; search this one first")
    training = {entry.stem: entry for entry in bench.files("train")}
    # By file: validation and test of one task are decided apart.
    evaluation = {entry.file: entry for entry in bench.entries if entry.split != "train"}
    decisions = []
    for number, pair in enumerate(content["pairs"]):
        if not isinstance(pair, dict) or set(pair) != DECISION_KEYS:
            raise ValueError(
                f"{path}: pair {number} is {pair!r}; its keys are {', '.join(sorted(DECISION_KEYS))}"
            )
        for key, known in (("training", training), ("evaluation", evaluation), ("decision", DECISIONS)):
            # As text: YAML may hold a list there, which no dictionary can be asked for.
            if str(pair[key]) not in known:
                raise ValueError(
                    f"{path}: pair {number} has {key} {pair[key]!r}; {near(str(pair[key]), list(known))}"
                )
        decisions.append((training[pair["training"]], evaluation[pair["evaluation"]], pair["decision"]))
    return decisions


def remove_contamination(
    bench_folder: Path,
    findings_folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    on_file: Callable[[], None] = lambda: None,
) -> Bench:
    """Write the bench without what the decisions of `findings_folder` take out of it.

    Raises FileNotFoundError or ValueError for findings of another bench, a malformed decision file, or an
    output that is taken.
    """
    bench = Bench.open(bench_folder)
    findings = open_findings(findings_folder, bench)
    decisions = load_decisions(findings_folder / DECISION_FILE, bench)
    # Before anything is written: a decision that cannot be followed leaves no trace.
    removed = _removed_rows(findings, decisions)
    ledger = bench.ledger()
    entries = []
    with working_folder(output, overwrite=overwrite) as folder:
        staging = folder / "bench"
        for entry in bench.entries:
            rows, reason = removed.get(entry.file, (np.empty(0, np.int64), ""))
            if len(rows):
                counts = ledger["tasks"][entry.stem]
                _account(counts, entry, len(rows), reason)
            # A file without rows would be a task without examples: it is left out instead.
            if len(rows) < entry.examples:
                entries.append(_copy_without(bench, entry, rows, staging))
            on_file()
        # What the bench was made with still holds: levels and splits stay, rows go.
        splits = json_object(bench.folder / MANIFEST)["splits"]
        (staging / LEDGER).write_bytes(orjson.dumps(ledger, option=orjson.OPT_INDENT_2) + b"\n")
        (staging / MANIFEST).write_bytes(manifest_bytes(bench.seed, splits, entries))
        put_in_place(staging, output)
    return Bench.open(output)


def _removed_rows(
    findings: Findings, decisions: list[Decision]
) -> Mapping[str, tuple[NDArray[np.int64], str]]:
    """By file: the rows that go, sorted, and why."""
    removed: dict[str, tuple[NDArray[np.int64], str]] = {}
    against: dict[str, list[BenchFile]] = defaultdict(list)
    trained = {training.file: training for training, _, _ in decisions}
    for training, evaluation, decision in decisions:
        if decision == "remove_training_examples":
            against[training.file].append(evaluation)
        elif decision == "remove_evaluation_examples":
            number = findings.evaluation.index(evaluation)
            # Counted from the file's own first row, as all rows that go are.
            rows = _specific_rows(findings, training, [number])[1] - findings.first_rows[number]
            # Several training tasks may each take rows of one evaluation file.
            before = removed.get(evaluation.file, (np.empty(0, np.int64), ""))[0]
            removed[evaluation.file] = (np.union1d(before, rows), EVALUATION_REASON)
    for file, evaluations in against.items():
        # All evaluation tasks of a training file at once: it is read again only one time.
        numbers = [findings.evaluation.index(evaluation) for evaluation in evaluations]
        ngrams, _ = _specific_rows(findings, trained[file], numbers)
        rows = _rows_that_hold(findings, trained[file], ngrams)
        removed[file] = (rows, TRAINING_REASON)
    # Last: a task that goes takes its rows with it.
    for training, evaluation, decision in decisions:
        whole = {"remove_training_task": training, "remove_evaluation_task": evaluation}.get(decision)
        if whole is not None:
            removed[whole.file] = (np.arange(whole.examples), TASK_REASON)
    return removed


def _specific_rows(
    findings: Findings, training: BenchFile, evaluation: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """N-grams of a training file that are specific to rows of evaluation files, and those rows."""
    held, held_by = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for some, rows in findings.index.holders(findings.specific_hits(training)["ngram"]):
        # Slice by slice, as the index yields them: all pairs at once would not be bounded.
        wanted = np.isin(findings.files_of(rows), evaluation)
        held.append(np.unique(some[wanted]))
        held_by.append(np.unique(rows[wanted]))
    return np.unique(np.concatenate(held)), np.unique(np.concatenate(held_by))


def _rows_that_hold(findings: Findings, training: BenchFile, ngrams: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of a training file that hold any of these n-grams, read once more."""
    hasher = NgramHasher(findings.ngram)
    rows = [np.empty(0, np.int64)]
    for piece in rows_with_ngrams(findings.bench, training, hasher):
        # The hits name one row of each n-gram alone, so the others have to be searched for.
        places, numbers = findings.index.find(piece.hashes_G)
        rows.append(piece.first_row + np.unique(piece.row_G[places[np.isin(numbers, ngrams)]]))
    return np.concatenate(rows)


def _account(counts: dict[str, Any], entry: BenchFile, rows: int, reason: str) -> None:
    counts["written"][entry.split] -= rows
    if not counts["written"][entry.split]:
        # As if the split had never had rows: the writer leaves such splits out as well.
        del counts["written"][entry.split]
    counts["dropped"][reason] = counts["dropped"].get(reason, 0) + rows
    counts["dropped"] = dict(sorted(counts["dropped"].items()))


def _copy_without(bench: Bench, entry: BenchFile, rows: NDArray[np.int64], staging: Path) -> BenchFile:
    if not len(rows):
        shutil.copyfile(bench.path(entry), staging / entry.file)
        return entry
    gone = set(rows.tolist())
    digest = hashlib.sha256()
    with bench.path(entry).open("rb") as source, (staging / entry.file).open("wb") as target:
        for line in _kept(source, gone):
            target.write(line)
            digest.update(line)
    return replace(entry, examples=entry.examples - len(gone), sha256=digest.hexdigest())


def _kept(lines: Iterable[bytes], gone: set[int]) -> Iterator[bytes]:
    return (line for number, line in enumerate(lines) if number not in gone)
