"""Draws documents for a plan: tasks, quotas and a seed enter, windows of one endless stream of draws leave.

Every task walks a seeded permutation of its documents again and again, so nothing comes twice before
everything came once; a document with several references gets one by the seed. The stream has a clock: draw
i of a task with quota q comes at moment (i + a random fraction) / q, so that in one unit of time every task
has had its quota, and in any stretch of it its part of that. Tasks of 4 and 2 draws may give a b a a b a. A
window is one stretch, computed by itself: nothing before it is needed, and memory is that of the window.

A document of more than `limit` tokens loses tokens from the left of its source, at least one stays; a target
that leaves no room for it is dropped and counted. With a limit of 9, source + target of

    6 + 3 = 9      stays whole, its 9 tokens take 8 slots of a row
    20 + 3         loses 14 tokens of its source
    20 + 9         is dropped: not one token of the source would stay

Suffixes: N draws of a window, K tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus.folder import Corpus, CorpusTask
from megatron_iml.data.plan.shares import TaskSize
from megatron_iml.data.plan.shuffle import Int64, fractions, permute, stream_key, words

# Documents measured at a time: a task of millions must not grow the memory of the measuring.
MEASURED_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Lengths of documents with one reference each, before and after cutting; all [N]."""

    source_N: Int64
    target_N: Int64
    limit: int

    @property
    def cut_N(self) -> Int64:
        """Tokens lost from the left of the source; more than it can spare where the document is dropped."""
        return np.maximum(self.source_N + self.target_N - self.limit, 0)

    @property
    def length_N(self) -> Int64:
        """Tokens kept, source and target."""
        return self.source_N + self.target_N - self.cut_N

    @property
    def num_targets_N(self) -> Int64:
        """Tokens that are predicted: the first token of a document without a source is not."""
        return self.target_N - (self.source_N == 0)

    @property
    def no_target_N(self) -> NDArray[np.bool_]:
        """Nothing to predict: an empty text."""
        return self.num_targets_N < 1

    @property
    def too_long_N(self) -> NDArray[np.bool_]:
        """The target alone, or with one source token, exceeds the limit."""
        return self.target_N + (self.source_N > 0) > self.limit

    @property
    def kept_N(self) -> NDArray[np.bool_]:
        """Neither dropped for its length nor for want of a target."""
        return ~(self.no_target_N | self.too_long_N)


def _measure_task(corpus: Corpus, task: CorpusTask, limit: int) -> TaskSize:
    tokens = targets = 0.0
    for first in range(task.first_document, task.stop_document, MEASURED_AT_ONCE):
        here = np.arange(first, min(first + MEASURED_AT_ONCE, task.stop_document))
        counts = corpus.reference_counts(here)
        # 0, 1, ... of every document, end to end.
        references = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        lengths = Lengths(*corpus.lengths(np.repeat(here, counts), references), limit)
        # A document's references are equally likely, so each counts as that fraction of a draw.
        weights = lengths.kept_N / np.repeat(counts, counts)
        tokens += float((weights * lengths.length_N).sum())
        targets += float((weights * lengths.num_targets_N).sum())
    count = len(task.documents)
    return TaskSize(task.name, task.benchmark, count, tokens / count, targets / count)


def measure_tasks(corpus: Corpus, tasks: Sequence[CorpusTask], limit: int) -> list[TaskSize]:
    """Return documents and mean tokens per draw of every task; a draw that would be dropped brings none."""
    return [_measure_task(corpus, task, limit) for task in tasks]


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """A window of the stream: task (index), document, reference and lengths of each draw, [N]."""

    task_N: Int64
    document_N: Int64
    reference_N: Int64
    lengths: Lengths


@dataclass(frozen=True, eq=False)
class DrawStream:
    """What the stream follows from, besides the corpus: small, so that processes can be sent it."""

    tasks: Sequence[CorpusTask]
    quotas_K: Int64
    """Draws of every task in one unit of time."""
    most_K: Int64
    """Draws that a task may have in all; then it is silent."""
    limit: int
    seed: int
    windows: int
    """In one unit of time."""

    @cached_property
    def keys_K(self) -> dict[str, NDArray[np.uint64]]:
        """Keys of every task: of its walk, its references and its moments."""
        # By name and not by number: a task keeps its walk whatever other tasks join the corpus or leave it.
        purposes = ("walk", "reference", "moment")
        return {
            purpose: np.array([stream_key(self.seed, purpose, task.name) for task in self.tasks])
            for purpose in purposes
        }

    @cached_property
    def firsts_K(self) -> Int64:
        """First document of every task."""
        return np.array([task.first_document for task in self.tasks])

    @cached_property
    def sizes_K(self) -> Int64:
        """Documents of every task."""
        return np.array([len(task.documents) for task in self.tasks])

    @property
    def last_window(self) -> int:
        """Number of the last window that can hold a draw."""
        # A task without a quota is never drawn; dividing by it would say that the stream has no end.
        drawn_K = self.quotas_K > 0
        # A draw may come a rounding error after the end of its stretch, where the next window begins.
        return int(np.ceil(self.windows * (self.most_K[drawn_K] / self.quotas_K[drawn_K]).max()))


def _turns(stream: DrawStream, begin: float, end: float) -> tuple[Int64, Int64]:
    """Return task and turn (which draw of its task) of the draws from `begin` to `end`, in their order."""
    quotas_K = stream.quotas_K
    # A random fraction moves a draw by less than one place, so these may lie within; some do not.
    first_K = np.maximum(np.floor(begin * quotas_K).astype(np.int64) - 1, 0)
    stop_K = np.minimum(np.ceil(end * quotas_K).astype(np.int64) + 1, stream.most_K)
    counts_K = np.where(quotas_K > 0, np.maximum(stop_K - first_K, 0), 0)
    task_N = np.repeat(np.arange(len(quotas_K)), counts_K)
    turn_N = np.arange(len(task_N)) + np.repeat(first_K - (np.cumsum(counts_K) - counts_K), counts_K)
    moment_N = (turn_N + fractions(stream.keys_K["moment"][task_N], turn_N)) / quotas_K[task_N]
    # Stable, or equal moments would fall as the machine's sort pleases.
    order_N = np.argsort(moment_N, kind="stable")
    order_N = order_N[(moment_N[order_N] >= begin) & (moment_N[order_N] < end)]
    return task_N[order_N], turn_N[order_N]


def draw_window(corpus: Corpus, stream: DrawStream, number: int) -> Draws:
    """Return the draws whose moment lies in window `number`, in the order of their moments."""
    task_N, turn_N = _turns(stream, number / stream.windows, (number + 1) / stream.windows)
    sizes_N = stream.sizes_K[task_N]
    # The same walk every time round: documents come back at equal distances. References are drawn by the
    # turn, so that another may come then.
    walk_N = permute(turn_N % sizes_N, sizes_N, stream.keys_K["walk"][task_N])
    document_N = stream.firsts_K[task_N] + walk_N
    picked_N = words(stream.keys_K["reference"][task_N], turn_N)
    reference_N = (picked_N % corpus.reference_counts(document_N).astype(np.uint64)).astype(np.int64)
    lengths = Lengths(*corpus.lengths(document_N, reference_N), stream.limit)
    return Draws(task_N, document_N, reference_N, lengths)
