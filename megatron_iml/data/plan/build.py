"""Builds the plan of a whole run: a corpus and a packing config enter, a plan folder leaves.

    measure   documents and mean tokens of every task, in one pass over the corpus's index
    blend     shares of the draws, number of draws, whole quotas: shares.py
    pack      window after window, by any number of processes: packing.py
    write     rows in the order of the windows: writer.py

Only lengths are read, tokens where prefixes are shared. Each window is a function of its number, so memory is
that of a window whatever the size of corpus and plan, and the bytes do not depend on the number of processes.
The ledger closes for every task: drawn = packed (some truncated) + dropped, by reason.

Suffixes: K tasks.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iml.data.corpus.folder import Corpus, CorpusTask
from megatron_iml.data.jobs import claim, worker_pool
from megatron_iml.data.plan.draws import DrawStream, measure_tasks
from megatron_iml.data.plan.folder import plan_fingerprint
from megatron_iml.data.plan.packing import PackedWindow, PackingConfig, pack_window
from megatron_iml.data.plan.shares import Blend, TaskSize, blend_tasks, largest_remainder
from megatron_iml.data.plan.shuffle import Int64
from megatron_iml.data.plan.writer import PlanWriter, finished_plan

DROP_REASONS = ("target_too_long", "no_target")
# Windows packed beforehand to see how much sharing prefixes saves.
PROBES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What a plan will draw, before any of it is packed: `quotas_K` draws of every task."""

    sizes: Sequence[TaskSize]
    blend: Blend
    quotas_K: Int64


def select_tasks(corpus: Corpus, level: str | None) -> list[CorpusTask]:
    """Return the tasks of a level, all without one. Raises ValueError where there are none."""
    tasks = [task for task in corpus.task_records if level in (None, task.level) and len(task.documents)]
    if not tasks:
        levels = sorted({task.level for task in corpus.task_records})
        raise ValueError(f"the corpus has no task of level {level!r}; it has {', '.join(levels)}")
    return tasks


def foresee_plan(corpus: Corpus, config: PackingConfig) -> Outlook:
    """Say what a plan would draw, without building it. Raises ValueError without `rows`."""
    if config.rows is None:
        raise ValueError("a plan of every document once follows no mixture; give a number of rows to explain")
    tasks = select_tasks(corpus, config.level)
    sizes = measure_tasks(corpus, tasks, config.limit)
    slots = float(config.rows * config.row_length)
    blend = blend_tasks(config.mixture, sizes, slots)
    if config.branches:
        # Stored once, a prefix takes no slot: the rows hold more documents than their lengths say.
        # The draws as they would be if nothing were shared: a sample of how much documents have in common.
        probe = _stream(tasks, largest_remainder(blend.shares_K, blend.draws), blend.most_K, config)
        packed = [pack_window(corpus, probe, config, number) for number in range(PROBES)]
        stored = sum(int(window.rows.slots_R.sum()) for window in packed)
        shared = sum(int(window.tally["shared_tokens"].sum()) for window in packed)
        # An estimate will do: the stream goes on until the rows are full, whatever the number of draws.
        blend = blend_tasks(config.mixture, sizes, slots * (1 + shared / max(stored, 1)))
    return Outlook(sizes, blend, largest_remainder(blend.shares_K, blend.draws))


def _stream(tasks: Sequence[CorpusTask], quotas_K: Int64, most_K: Int64, config: PackingConfig) -> DrawStream:
    # Whole, so that a unit of time ends where a window does.
    windows = max(1, round(int(quotas_K.sum()) / config.window))
    return DrawStream(tasks, quotas_K, most_K, config.limit, config.seed, windows)


def draw_plan(corpus: Corpus, config: PackingConfig) -> DrawStream:
    """Return the stream of a plan: every document once, or from the mixture until the rows are full.

    Raises ValueError for a mixture that the corpus cannot follow in so many rows.
    """
    tasks = select_tasks(corpus, config.level)
    if config.rows is None:
        # Quota and bound in one: after a unit of time every task falls silent.
        once_K = np.array([len(task.documents) for task in tasks])
        return _stream(tasks, once_K, once_K, config)
    outlook = foresee_plan(corpus, config)
    # A plan that quietly follows another mixture than the file says is worth nothing.
    if outlook.blend.shortfalls:
        raise ValueError(f"the mixture cannot be followed: {'; '.join(outlook.blend.shortfalls)}")
    return _stream(tasks, outlook.quotas_K, outlook.blend.most_K, config)


@cache
def _opened(folder: Path) -> Corpus:
    """Open a corpus once per process: a worker cannot be sent a map."""
    return Corpus.open(folder)


def _pack_in_worker(folder: Path, stream: DrawStream, config: PackingConfig, number: int) -> PackedWindow:
    return pack_window(_opened(folder), stream, config, number)


def _packed_windows(
    corpus: Corpus, stream: DrawStream, config: PackingConfig, workers: int
) -> Generator[PackedWindow, None, None]:
    """Yield the windows in their order, packed by other processes if there are several."""
    numbers = range(stream.last_window + 1)
    with worker_pool(workers) as pool:
        if pool is None:
            yield from (pack_window(corpus, stream, config, number) for number in numbers)
            return
        waiting: deque[Future[PackedWindow]] = deque()
        for number in numbers:
            waiting.append(pool.submit(_pack_in_worker, corpus.folder, stream, config, number))
            # Bounded, or windows would pile up before a slow disk.
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def build_plan(
    corpus: Corpus,
    config: PackingConfig,
    folder: Path,
    advance: Callable[[int, int], None],
    workers: int = 1,
) -> dict[str, Any]:
    """Write a plan, whole or not at all, and return its manifest; one that lies there finished is kept.

    `advance` hears the draws of every window and of all windows. Raises ValueError when the folder holds
    something else, when another process builds it, for a mixture that cannot be followed, and when nothing
    fits a row.
    """
    with claim(folder):
        return _build_plan(corpus, config, folder, advance, workers)


def _build_plan(
    corpus: Corpus,
    config: PackingConfig,
    folder: Path,
    advance: Callable[[int, int], None],
    workers: int,
) -> dict[str, Any]:
    origin = config.origin(corpus)
    finished = finished_plan(folder, plan_fingerprint(origin))
    if finished is not None:
        return finished
    stream = draw_plan(corpus, config)
    tally: dict[str, Int64] = {}
    # Windows are closed when the rows are full: they would go on, and their workers with them.
    with (
        PlanWriter(folder, origin) as writer,
        closing(_packed_windows(corpus, stream, config, workers)) as windows,
    ):
        for number, window in enumerate(windows):
            if config.rows is not None and writer.num_rows + len(window.rows.counts_R) > config.rows:
                # How many rows the last window is to have is known only here, so it is packed a second time.
                window = pack_window(corpus, stream, config, number, config.rows - writer.num_rows)
            writer.append(window.rows)
            tally = {name: counts_K + tally.get(name, 0) for name, counts_K in window.tally.items()}
            advance(int(window.tally["drawn"].sum()), int(stream.quotas_K.sum()))
            if writer.num_rows == config.rows:
                break
        if not writer.num_rows:
            raise ValueError(f"no document fits {config.limit} tokens; raise row_length")
        if config.rows not in (None, writer.num_rows):
            raise ValueError(
                f"max_epochs lets the corpus fill {writer.num_rows} rows, {config.rows} were asked for; "
                "raise it or ask for fewer rows"
            )
        return writer.close(_ledger(stream.tasks, tally))


def _ledger(tasks: Sequence[CorpusTask], tally: dict[str, Int64]) -> dict[str, dict[str, Any]]:
    ledger = {}
    for k, task in enumerate(tasks):
        line: dict[str, Any] = {name: int(counts_K[k]) for name, counts_K in tally.items()}
        line["dropped"] = {reason: line.pop(reason) for reason in DROP_REASONS}
        assert line["drawn"] == line["packed"] + sum(line["dropped"].values()), f"{task.name}: {line}"
        ledger[task.name] = {"documents": len(task.documents), **line}
    return ledger
