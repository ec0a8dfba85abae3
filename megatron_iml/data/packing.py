"""Builds a pack plan: a corpus, a mixture and a seed enter, rows of whole documents leave; lengths only.

    draw    task quotas by largest remainder, then one stream of documents, cut or dropped: see draws.py
    pack    windows of the stream, in order: longest document first, each into the row it fills best
    order   rows are shuffled within their window; nothing depends on the number of data-parallel ranks

With row_length 8, documents of 9, 5, 4 and 3 tokens take 8, 4, 3 and 2 slots: rows [9], [5 4], and the 3
opens a third row or, if the plan was to have two, is not part of it.

Suffixes: N draws, K tasks, P packed draws, R rows, W documents of one window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_iml.data.corpus import Corpus, CorpusTask
from megatron_iml.data.draws import Draws, Int64, draw_stream, measure_tasks, permutation
from megatron_iml.data.mixture import (
    ExplainedTask,
    Mixture,
    Shares,
    TaskSize,
    explain,
    largest_remainder,
    task_shares,
)
from megatron_iml.data.plan import ENTRY, PlanArrays

# Raise it whenever the same inputs give another plan: it is part of a plan's fingerprint.
ALGORITHM_VERSION = 1
# Documents packed together. Best fit among 16,384 fills 99.9 % of rows of 2,048; the smaller the window, the
# more evenly every stretch of the run follows the mixture.
WINDOW = 1 << 14
# Draws beyond the expected need: what is not needed to fill the last row is not part of the plan.
SPARE_DRAWS = 1.02
TARGET_TOO_LONG = "target_too_long"
NO_TARGET = "no_target"


@dataclass(frozen=True, slots=True)
class PackingConfig:
    """What a plan is made from, besides its corpus."""

    mixture: Mixture
    row_length: int
    rows: int | None
    """Rows to fill by drawing from the mixture; None takes every document exactly once."""
    seed: int
    level: str | None = None
    """Only tasks of this generalisation level."""
    max_positions: int = 2048

    def __post_init__(self) -> None:
        if min(self.rows or 1, self.row_length, self.max_positions) < 1 or self.rows == 0:
            raise ValueError(
                f"rows {self.rows}, row_length {self.row_length}, max_positions {self.max_positions}: "
                "each must be at least 1"
            )
        # A plan stores lengths in 16 bits, and numpy would wrap a longer one without a word.
        if self.limit > np.iinfo(ENTRY["length"]).max:
            raise ValueError(
                f"row_length {self.row_length} and max_positions {self.max_positions} let documents have "
                f"{self.limit} tokens; a plan holds at most 65535: lower max_positions"
            )

    @property
    def limit(self) -> int:
        """Tokens of the longest document that is kept whole."""
        return min(self.row_length, self.max_positions) + 1

    def origin(self, corpus: Corpus) -> dict[str, Any]:
        """Return everything the plan follows from; its digest is the plan's fingerprint."""
        return {
            "algorithm_version": ALGORITHM_VERSION,
            "corpus_fingerprint": corpus.fingerprint,
            "mixture": self.mixture.as_dict() if self.rows is not None else None,
            "row_length": self.row_length,
            "max_positions": self.max_positions,
            "rows": self.rows,
            "level": self.level,
            "seed": self.seed,
        }


def best_fit(slots_W: Int64, row_length: int) -> tuple[Int64, int]:
    """Assign documents to rows, longest first, each to the open row it fills best; return row_W, rows.

    Open rows are kept by the space they have left; the set of spaces in use is one integer, whose lowest bit
    at or above a length is the best fit.
    """
    by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0
    rows = 0
    row_of = [0] * len(slots_W)
    slots = slots_W.tolist()
    # Longest first: what is left over at the end is small and fits anywhere.
    for document in np.argsort(-slots_W, kind="stable").tolist():
        need = slots[document]
        fitting = spaces >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = row_length, rows
            rows += 1
        row_of[document] = row
        left = space - need
        if left:
            by_space[left].append(row)
            spaces |= 1 << left
    return np.array(row_of, dtype=np.int64), rows


def _fit_exactly(slots_W: Int64, row_length: int, rows: int) -> Int64:
    """Assign the longest prefix of a window that `rows` rows hold; a document beyond gets no row."""
    holds, exceeds = 0, len(slots_W)
    while exceeds - holds > 1:
        middle = (holds + exceeds) // 2
        if best_fit(slots_W[:middle], row_length)[1] <= rows:
            holds = middle
        else:
            exceeds = middle
    row_W, used = best_fit(slots_W[:holds], row_length)
    # One document more may cost two rows: then the next ones fill the missing rows by themselves.
    return np.concatenate((row_W, np.arange(used, rows)))


def pack_stream(slots_N: Int64, config: PackingConfig) -> Int64:
    """Assign documents to rows, window by window; return the row of each document that the plan takes.

    With `config.rows` the plan takes the longest prefix of the stream that fills exactly so many rows.
    """
    assigned: list[Int64] = []
    rows = 0
    for number, start in enumerate(range(0, len(slots_N), WINDOW)):
        window = slots_N[start : start + WINDOW]
        row_W, used = best_fit(window, config.row_length)
        if config.rows is not None and rows + used > config.rows:
            used = config.rows - rows
            row_W = _fit_exactly(window, config.row_length, used)
        # Unshuffled, the long documents of a window would all come in its first steps.
        shuffled = permutation(used, config.seed, "rows", number)
        assigned.append(rows + shuffled[row_W])
        rows += used
        if rows == config.rows:
            break
    return np.concatenate(assigned)


def _expected_draws(sizes: Sequence[TaskSize], shares_K: Shares, config: PackingConfig, rows: int) -> float:
    """Return how many draws fill `rows` rows, on the average."""
    # A draw of t tokens takes t - 1 slots, but one that is dropped takes none, hence the bound from below.
    slots_per_draw = float(shares_K @ np.array([max(size.tokens - 1, 0) for size in sizes]))
    if slots_per_draw == 0:
        raise ValueError(f"no document of the mixture fits {config.limit} tokens; raise row_length")
    return rows * config.row_length / slots_per_draw


def explain_plan(corpus: Corpus, config: PackingConfig) -> list[ExplainedTask]:
    """Say what a plan would draw of every task, without building it. Raises ValueError without `rows`."""
    if config.rows is None:
        raise ValueError("a plan of every document once follows no mixture; give a number of rows to explain")
    sizes = measure_tasks(corpus, select_tasks(corpus, config.level), config.limit)
    shares_K = task_shares(config.mixture, sizes)
    return explain(config.mixture, sizes, round(_expected_draws(sizes, shares_K, config, config.rows)))


def _draw_enough(corpus: Corpus, tasks: Sequence[CorpusTask], config: PackingConfig) -> Draws:
    """Draw from the mixture until the kept documents cannot fit into fewer rows than asked for."""
    if config.rows is None:
        once_K = np.array([len(task.documents) for task in tasks])
        return draw_stream(corpus, tasks, once_K, config.limit, config.seed)
    sizes = measure_tasks(corpus, tasks, config.limit)
    shares_K = task_shares(config.mixture, sizes)
    needed = config.rows * config.row_length
    draws = int(_expected_draws(sizes, shares_K, config, config.rows) * SPARE_DRAWS) + 1
    while True:
        quotas_K = largest_remainder(shares_K, draws)
        stream = draw_stream(corpus, tasks, quotas_K, config.limit, config.seed)
        lengths = stream.lengths
        slots = int((lengths.length_N - 1)[lengths.kept_N].sum())
        if slots >= needed:
            return stream
        # Expected values may fall short where documents vary widely; the same seed repeats the same tries.
        draws = int(draws * 1.1) + 16


def select_tasks(corpus: Corpus, level: str | None) -> list[CorpusTask]:
    """Return the tasks of a level, all without one. Raises ValueError where there are none."""
    tasks = [task for task in corpus.task_records if level in (None, task.level) and len(task.documents)]
    if not tasks:
        levels = sorted({task.level for task in corpus.task_records})
        raise ValueError(f"the corpus has no task of level {level!r}; it has {', '.join(levels)}")
    return tasks


def build_plan(corpus: Corpus, config: PackingConfig) -> tuple[PlanArrays, dict[str, dict[str, Any]]]:
    """Return the plan's arrays and its ledger: per task, drawn = packed (some truncated) + dropped."""
    tasks = select_tasks(corpus, config.level)
    draws = _draw_enough(corpus, tasks, config)
    kept = np.flatnonzero(draws.lengths.kept_N)
    if not len(kept):
        raise ValueError(f"no document fits {config.limit} tokens; raise row_length")
    row_P = pack_stream((draws.lengths.length_N - 1)[kept], config)
    packed = kept[: len(row_P)]
    # Draws after the last one packed are not part of the plan; dropped ones before it are.
    taken = int(packed[-1]) + 1 if config.rows is not None else len(draws.task_N)
    return _arrange(draws, packed, row_P), _account(tasks, draws, packed, taken)


def _arrange(draws: Draws, packed: Int64, row_P: Int64) -> PlanArrays:
    """Sort packed draws by row, in stream order within a row, and sum up the rows."""
    order = np.argsort(row_P, kind="stable")
    chosen, row_P = packed[order], row_P[order]
    lengths = draws.lengths
    entries = np.zeros(len(chosen), dtype=ENTRY)
    entries["document"] = draws.document_N[chosen]
    entries["cut"] = lengths.cut_N[chosen]
    entries["reference"] = draws.reference_N[chosen]
    entries["length"] = lengths.length_N[chosen]
    # 0 would hang every document on the first of its row.
    entries["trunk"] = -1
    num_rows = int(row_P[-1]) + 1
    counts_R = np.bincount(row_P, minlength=num_rows)
    assert counts_R.min() > 0, f"{(counts_R == 0).sum()} rows of {num_rows} are empty"
    row_starts = np.concatenate(([0], np.cumsum(counts_R)))
    # The last token takes no slot; slot i sees i + 1 columns.
    slots = lengths.length_N[chosen] - 1
    return PlanArrays(
        entries,
        row_starts,
        np.add.reduceat(lengths.num_targets_N[chosen], row_starts[:-1]).astype(np.uint32),
        np.add.reduceat(slots * (slots + 1) // 2, row_starts[:-1]).astype(np.uint64),
    )


def _account(
    tasks: Sequence[CorpusTask], draws: Draws, packed: Int64, taken: int
) -> dict[str, dict[str, Any]]:
    lengths = draws.lengths

    def per_task(chosen: Int64, weights: Int64 | None = None) -> list[int]:
        values = None if weights is None else weights[chosen]
        counts = np.bincount(draws.task_N[chosen], values, minlength=len(tasks))
        return counts.astype(np.int64).tolist()

    every = np.arange(taken)
    columns = {
        "documents": [len(task.documents) for task in tasks],
        "drawn": per_task(every),
        "packed": per_task(packed),
        "truncated": per_task(packed[lengths.cut_N[packed] > 0]),
        TARGET_TOO_LONG: per_task(every[lengths.too_long_N[:taken]]),
        NO_TARGET: per_task(every[lengths.no_target_N[:taken]]),
        "tokens": per_task(packed, lengths.length_N),
        "target_tokens": per_task(packed, lengths.num_targets_N),
    }
    ledger = {}
    for k, task in enumerate(tasks):
        line: dict[str, Any] = {name: column[k] for name, column in columns.items()}
        line["dropped"] = {reason: line.pop(reason) for reason in (TARGET_TOO_LONG, NO_TARGET)}
        assert line["drawn"] == line["packed"] + sum(line["dropped"].values()), f"{task.name}: {line}"
        ledger[task.name] = line
    return ledger
