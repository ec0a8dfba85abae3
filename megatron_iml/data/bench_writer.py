"""Writes a bench: every task in one form, split, counted and checksummed.

What enters: the tasks of all sources, their ledger and the splits. What leaves: a bench folder
(`data/bench.py`), whole or not at all: it is written beside its place and renamed at the end.

    Task "t" of 1,000 examples, 20 validation, 50 test
    ->  train/B__C__t.jsonl 930 rows, validation/... 20, test/... 50; ledger: read 1000 = written 1000

Each task is written once to a spool file while its hashes are taken, then its lines are dealt to the
splits: memory grows by 16 bytes an example, and no example is read twice.
"""

import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_iml.data.bench import (
    FORMAT_VERSION,
    LEDGER,
    Bench,
    BenchFile,
    file_stem,
    manifest_bytes,
)
from megatron_iml.data.example import Example, Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.levels import levels_of
from megatron_iml.data.manifest import MANIFEST
from megatron_iml.data.prompts import clean_target, with_delimiter
from megatron_iml.data.splits import (
    DROP_REASONS,
    SPLITS,
    Level,
    Splits,
    assign,
    instance_hash,
    source_hash,
)


def build_bench(
    tasks: Sequence[Task],
    drops: Drops,
    splits: Splits,
    output: Path,
    *,
    overwrite: bool = False,
    on_task: Callable[[Task], None] = lambda task: None,
) -> Bench:
    """Write all tasks to a new bench.

    Args:
        tasks: in the order of the manifest.
        drops: the ledger the tasks' readers count in.
        splits: what is held out.
        output: the bench folder; must be absent or empty unless `overwrite`.
        overwrite: replace a bench; anything else in its place is still refused.
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
    _check_output(output, overwrite)
    with _staging(output) as staging:
        for split in SPLITS:
            (staging / split).mkdir()
        entries: list[BenchFile] = []
        for task, stem, level in zip(tasks, stems, levels, strict=True):
            counts = drops.task(task.benchmark, task.name)
            # One task at a time: the disk holds one task twice, never the whole bench.
            entries += _write_task(task, stem, level, splits, counts, staging)
            counts.check_closes(stem)
            on_task(task)
        accounts = {
            stem: drops.task(task.benchmark, task.name).as_json()
            for task, stem in zip(tasks, stems, strict=True)
        }
        ledger = {"format_version": FORMAT_VERSION, "tasks": accounts, "skipped_files": drops.skipped_files}
        (staging / LEDGER).write_bytes(orjson.dumps(ledger, option=orjson.OPT_INDENT_2) + b"\n")
        (staging / MANIFEST).write_bytes(manifest_bytes(splits.seed, asdict(splits), entries))
        _put_in_place(staging, output)
    # Through the reader, which checks what was just written.
    return Bench.open(output)


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
    if 0 < len(distinct) < len(texts):
        counts.repaired[f"blank or repeated {kind} removed"] += len(texts) - len(distinct)
    return distinct


def _write_task(
    task: Task, stem: str, level: Level | None, splits: Splits, counts: TaskCounts, staging: Path
) -> list[BenchFile]:
    spool = staging / "spool.jsonl"
    # 8 bytes a hash; Python integers in a list would take 40.
    instances, sources = array("Q"), array("Q")
    with spool.open("wb") as file:
        for example in task.examples():
            row = render_row(example, task.metric, splits.seed, counts)
            if row is not None:
                instances.append(instance_hash(splits.seed, task.name, example.instance or example.id))
                # Pretraining text has no source of its own to compare.
                sources.append(source_hash(example.source.strip() or row["tgt"]))
                file.write(orjson.dumps(row) + b"\n")
    hashes = (np.array(instances, np.uint64), np.array(sources, np.uint64))
    split_N = assign(splits, task.benchmark, level, *hashes)
    for code, reason in DROP_REASONS.items():
        if dropped := int(np.count_nonzero(split_N == code)):
            counts.drop(reason, dropped)
    written = _deal(spool, split_N, staging, stem)
    # The next task writes its own; a bench folder holds nothing but the bench.
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


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file() or not (output / LEDGER).is_file():
        raise ValueError(
            f"{output} holds something that is not a bench and is never replaced; give another --output"
        )
    if not overwrite:
        raise ValueError(
            f"{output} holds a bench already; give another --output, or --overwrite to replace it"
        )


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside `output`, so that a rename puts it in place; removed if the build fails."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.{os.getpid()}.partial"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, output: Path) -> None:
    # A folder cannot be renamed over a full one: the old bench steps aside, and goes when the new one stands.
    replaced = staging.with_suffix(".replaced")
    if output.exists():
        output.rename(replaced)
    staging.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
