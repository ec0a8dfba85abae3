"""Writes a bench: every task in one form, split, counted and checksummed.

What enters: the tasks of all sources, their ledger and the splits. What leaves: a bench folder
(`folder.py`), whole or not at all: it is written beside its place and renamed at the end.

    Task "t" of 1,000 examples, 20 validation, 50 test
    ->  train/B__C__t.jsonl 930 rows, validation/... 20, test/... 50; ledger: read 1000 = written 1000

Each task is written once to a spool file while its hashes are taken, then its lines are dealt to the
splits: memory grows by 24 bytes an example of the largest task, and no example is read twice. A written task
has a record, so a build that was killed goes on, and jobs can share the tasks out (`data/jobs.py`).

    .bench.partial/bench/{train,validation,test}/...      what becomes the bench
    .bench.partial/records/B__C__t.json                   {"origin": ..., "entries": [...], "counts": {...}}
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_iml.data.bench.folder import FORMAT_VERSION, LEDGER, Bench, BenchFile, file_stem, manifest_bytes
from megatron_iml.data.bench.levels import levels_of
from megatron_iml.data.bench.prompts import clean_target, with_delimiter
from megatron_iml.data.bench.splits import DROP_REASONS, SPLITS, Level, Splits, assign
from megatron_iml.data.bench.staging import put_in_place, working_folder
from megatron_iml.data.example import Example, Metric, Task, instance_hash, source_hash
from megatron_iml.data.jobs import WHOLE, Job, claim, finished_record, worker_pool, write_json
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.manifest import MANIFEST


def build_bench(
    tasks: Sequence[Task],
    drops: Drops,
    splits: Splits,
    output: Path,
    *,
    overwrite: bool = False,
    inputs: str | None = None,
    workers: int = 1,
    job: Job = WHOLE,
    on_task: Callable[[], None] = lambda: None,
) -> Bench | None:
    """Write all tasks to a new bench.

    Args:
        tasks: in the order of the manifest.
        drops: the ledger the tasks' readers count in.
        splits: what is held out.
        output: the bench folder; must be absent or empty unless `overwrite`.
        overwrite: replace a bench; anything else in its place is still refused.
        inputs: a digest of what the tasks are read from. Tasks that an earlier run or another job wrote from
            the same are kept; without it nothing is.
        workers: processes that write tasks; more than one needs tasks that can be pickled.
        job: the share of the tasks to write. One job of several returns None: a run of the whole finishes.
        on_task: called after each task.

    Raises:
        ValueError: no tasks, unknown held-out names, two tasks of one file name, `output` is taken.
    """
    if not tasks:
        skipped = ", ".join(list(drops.skipped_files)[:3]) or "none"
        raise ValueError(
            f"the sources hold no task; skipped files: {skipped}; check the folders of the config"
        )
    # Everything that can be wrong with names is found before the first example is read.
    levels = levels_of(splits, tasks)
    stems = _unique_stems(tasks)
    # As text: a record read back holds lists where the splits hold tuples.
    origin = inputs and hashlib.sha256(f"{inputs} {splits}".encode()).hexdigest()
    work = working_folder(output, overwrite=overwrite, keep=inputs is not None, shared=job.is_share)
    with work as folder, worker_pool(workers) as pool:
        # In one tuple: pickled apart, the reader inside `task` would count in another account.
        works = [
            (task, stem, level, splits, drops.task(task.benchmark, task.name), origin, folder)
            for number, (task, stem, level) in enumerate(zip(tasks, stems, levels, strict=True))
            if job.owns(number)
        ]
        records = []
        for record in _in_order(pool, works):
            records.append(record)
            on_task()
        if job.is_share:
            return None
        accounts = {stem: record["counts"] for stem, record in zip(stems, records, strict=True)}
        entries = [BenchFile(**entry) for record in records for entry in record["entries"]]
        ledger = {"format_version": FORMAT_VERSION, "tasks": accounts, "skipped_files": drops.skipped_files}
        _finish(folder, entries, ledger, splits, output)
    # Through the reader, which checks what was just written.
    return Bench.open(output)


def _in_order(pool: ProcessPoolExecutor | None, works: list[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    if pool is None:
        for work in works:
            yield _write_or_keep(*work)
    else:
        # In the order of the tasks, whoever ends first: the manifest must not depend on the workers.
        for future in [pool.submit(_write_or_keep, *work) for work in works]:
            yield future.result()


def render_row(example: Example, metric: Metric, seed: int, counts: TaskCounts) -> dict[str, Any] | None:
    """The bench row of an example; None, with the reason in `counts`, where it cannot be scored."""
    targets = _distinct(example.targets, counts, "reference")
    candidates = _distinct(example.candidates, counts, "candidate") if example.candidates else []
    if not targets:
        counts.drop("blank target")
        return None
    # Said here, where it costs a row; the evaluation could only stop, or find the only candidate right.
    if metric == "accuracy" and len(candidates) < 2:
        counts.drop("fewer than two candidates in a task scored by accuracy")
        return None
    if candidates and targets[0] not in candidates:
        counts.drop("target is not among the candidates")
        return None
    row: dict[str, Any] = {
        "id": example.id,
        "src": with_delimiter(example.source, seed, example.task, example.id),
        "tgt": targets[0],
    }
    if len(targets) > 1:
        row["references"] = targets
    if candidates:
        row["candidates"] = candidates
    if example.instruction:
        assert example.source.startswith(example.instruction), f"{example.id}: source has another start"
        # Its length alone: the text is most of many a source.
        row["instruction"] = len(example.instruction)
    return row


def _distinct(texts: Sequence[str], counts: TaskCounts, kind: str) -> list[str]:
    """Cleaned texts without blank and repeated ones, in their order."""
    # dict and not set: the first reference is the one trained on, so the order counts.
    distinct = list(dict.fromkeys(text for text in map(clean_target, texts) if text))
    # Where nothing is left the instance is dropped, which is counted elsewhere.
    if 0 < len(distinct) < len(texts):
        counts.repaired[f"blank or repeated {kind} removed"] += len(texts) - len(distinct)
    return distinct


def _write_or_keep(
    task: Task,
    stem: str,
    level: Level | None,
    splits: Splits,
    counts: TaskCounts,
    origin: str | None,
    folder: Path,
) -> dict[str, Any]:
    """Write a task and its record, unless both are there; return the record."""
    path = folder / "records" / f"{stem}.json"
    record = finished_record(path, origin)
    # By size and not by digest: reading everything again would cost what a record is to save.
    if record is not None and all(
        (folder / "bench" / file).is_file() and (folder / "bench" / file).stat().st_size == size
        for file, size in record["bytes"].items()
    ):
        return record
    # Jobs share the folder, so each task needs a holder of its own.
    with claim(path.with_suffix("")):
        entries = _write_task(task, stem, level, splits, counts, folder)
        counts.check_closes(stem)
        record = {
            "origin": origin,
            "entries": [asdict(entry) for entry in entries],
            "counts": counts.as_json(),
            "bytes": {entry.file: (folder / "bench" / entry.file).stat().st_size for entry in entries},
        }
        # Without a name for its inputs nobody may take the record up.
        if origin is not None:
            write_json(path, record)
    return record


def _write_task(
    task: Task, stem: str, level: Level | None, splits: Splits, counts: TaskCounts, folder: Path
) -> list[BenchFile]:
    # Beside the records: what a killed run leaves of it can never become part of the bench.
    spool = folder / "records" / f"{stem}.spool"
    # 8 bytes a hash; Python integers in a list would take 40.
    instances, sources, ids = array("Q"), array("Q"), array("Q")
    with spool.open("wb") as file:
        for example in task.examples():
            row = render_row(example, task.metric, splits.seed, counts)
            if row is not None:
                # By the task's own name: another category, which is part of the stem, moves no instance.
                instances.append(instance_hash(splits.seed, task.name, example.instance or example.id))
                # Pretraining text has no source of its own to compare.
                sources.append(source_hash(example.source.strip() or row["tgt"]))
                ids.append(source_hash(example.id))
                file.write(orjson.dumps(row) + b"\n")
    # Such rows stay, and go to one split together: an id says which delimiter and which split.
    if repeated := len(ids) - len(np.unique(np.array(ids, np.uint64))):
        counts.repaired["row kept whose id was there before"] += repeated
    hashes = (np.array(instances, np.uint64), np.array(sources, np.uint64))
    split_N = assign(splits, task.benchmark, level, *hashes)
    for code, reason in DROP_REASONS.items():
        if dropped := int(np.count_nonzero(split_N == code)):
            counts.drop(reason, dropped)
    written = _deal(spool, split_N, folder / "bench", stem)
    spool.unlink()
    entries = []
    for split, (examples, sha256) in zip(SPLITS, written, strict=True):
        if examples:
            assert level is not None, f"{stem} has no level, and yet {examples} rows in {split}"
            counts.written[split] = examples
            file_name = f"{split}/{stem}.jsonl"
            names = (task.name, task.benchmark, task.category)
            entries.append(
                BenchFile(*names, level, split, examples, task.metric, sha256, file_name, task.parent)
            )
    return entries


def _deal(spool: Path, split_N: np.ndarray, staging: Path, stem: str) -> list[tuple[int, str]]:
    """Copy the lines of `spool` to the files of their splits; rows and SHA-256 of each."""
    digests = [hashlib.sha256() for _ in SPLITS]
    paths = [staging / split / f"{stem}.jsonl" for split in SPLITS]
    with ExitStack() as stack:
        lines = stack.enter_context(spool.open("rb"))
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for line, split in zip(lines, split_N.tolist(), strict=True):
            # A negative code is a drop, which the caller has counted.
            if split >= 0:
                files[split].write(line)
                digests[split].update(line)
    examples = [int(np.count_nonzero(split_N == index)) for index in range(len(SPLITS))]
    for path, count in zip(paths, examples, strict=True):
        # A file without rows would be a task without examples to everyone who reads the folder.
        if not count:
            path.unlink()
    return [(count, digest.hexdigest()) for count, digest in zip(examples, digests, strict=True)]


def _unique_stems(tasks: Sequence[Task]) -> list[str]:
    owners: dict[str, Task] = {}
    categories: dict[tuple[str, str], str] = {}
    for task in tasks:
        # The ledger knows a task by benchmark and name: a second category would share its account.
        category = categories.setdefault((task.benchmark, task.name), task.category)
        if category != task.category:
            raise ValueError(
                f"task {task.name!r} of {task.benchmark} has the categories {category!r} and "
                f"{task.category!r}; a task has one: rename one of the files"
            )
        stem = file_stem(task.benchmark, task.category, task.name)
        if (other := owners.setdefault(stem, task)) is not task:
            raise ValueError(
                f"two tasks would be written to {stem}.jsonl: {other.name!r} and {task.name!r}; "
                "a source is listed twice, or one of the files needs another name"
            )
    return list(owners)


def _remove_strangers(staging: Path, files: set[str]) -> None:
    # Tasks that a first try knew and this one does not, e.g. since a source was taken out.
    for path in staging.glob("*/*"):
        if path.relative_to(staging).as_posix() not in files:
            path.unlink()


def _finish(
    folder: Path, entries: list[BenchFile], ledger: dict[str, Any], splits: Splits, output: Path
) -> None:
    staging = folder / "bench"
    _remove_strangers(staging, {entry.file for entry in entries})
    (staging / LEDGER).write_bytes(orjson.dumps(ledger, option=orjson.OPT_INDENT_2) + b"\n")
    (staging / MANIFEST).write_bytes(manifest_bytes(splits.seed, asdict(splits), entries))
    put_in_place(staging, output)
