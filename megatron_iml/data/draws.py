"""Draws documents for a plan: tasks, quotas and a seed enter, one stream of draws leaves.

Every task walks a seeded permutation of its documents again and again, so nothing comes twice before
everything came once; a document with several references gets one by the seed. The draws of all tasks are
spread evenly over the stream, each at random in its stretch: tasks of 4 and 2 draws may give a b a a b a.

A document of more than `limit` tokens loses tokens from the left of its source, at least one stays; a target
that leaves no room for it is dropped and counted. With a limit of 9, source + target of

    6 + 3 = 9      stays whole, its 9 tokens take 8 slots of a row
    20 + 3         loses 14 tokens of its source
    20 + 9         is dropped: not one token of the source would stay

Suffixes: N draws, K tasks, D documents of the corpus.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus import Corpus, CorpusTask
from megatron_iml.data.mixture import TaskSize

Int64 = NDArray[np.int64]


def random_words(count: int, *key: int | str) -> NDArray[np.uint64]:
    """Return random 64-bit words of a key. Unlike numpy's Generator, its bit generators never change."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def permutation(count: int, *key: int | str) -> Int64:
    """Return a random order of `range(count)` that follows from the key alone."""
    # Sorting random words: Generator.permutation may change between versions of numpy.
    return np.argsort(random_words(count, *key), kind="stable")


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


def measure_tasks(corpus: Corpus, tasks: Sequence[CorpusTask], limit: int) -> list[TaskSize]:
    """Return documents and mean tokens per draw of every task; a draw that would be dropped brings none."""
    sources_D, references_D = corpus.source_lengths_D, corpus.num_references_D
    sizes = []
    for task in tasks:
        here = slice(task.first_document, task.stop_document)
        counts = references_D[here].astype(np.int64)
        documents = np.repeat(np.arange(task.first_document, task.stop_document), counts)
        references = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        lengths = Lengths(
            np.repeat(sources_D[here].astype(np.int64), counts),
            corpus.reference_lengths(documents, references).astype(np.int64),
            limit,
        )
        # A document's references are equally likely, so each counts as that fraction of a draw.
        weights = lengths.kept_N / np.repeat(counts, counts) / len(task.documents)
        tokens, targets = (weights * lengths.length_N).sum(), (weights * lengths.num_targets_N).sum()
        sizes.append(TaskSize(task.name, task.benchmark, len(task.documents), float(tokens), float(targets)))
    return sizes


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """A stream of draws: task (index), document, reference and lengths of each, [N]."""

    task_N: Int64
    document_N: Int64
    reference_N: Int64
    lengths: Lengths


def draw_stream(corpus: Corpus, tasks: Sequence[CorpusTask], quotas_K: Int64, limit: int, seed: int) -> Draws:
    """Draw `quotas_K[k]` documents of every task and spread them evenly over one stream."""
    counts_D, sources_D = corpus.num_references_D, corpus.source_lengths_D
    task, document, reference, moment = [], [], [], []
    for k, (record, quota) in enumerate(zip(tasks, quotas_K.tolist(), strict=True)):
        # resize repeats the order: each pass over a task is whole before the next begins.
        walk = np.resize(permutation(len(record.documents), seed, "walk", record.name), quota)
        drawn = record.first_document + walk
        pick = random_words(quota, seed, "reference", record.name)
        # 53 bits are what a float holds: the quotient stays below 1.
        jitter = (random_words(quota, seed, "moment", record.name) >> np.uint64(11)) / 2.0**53
        task.append(np.full(quota, k))
        document.append(drawn)
        reference.append((pick % counts_D[drawn].astype(np.uint64)).astype(np.int64))
        # The i-th of q draws lies somewhere in the i-th q-th of the stream, so a task's walk keeps its order.
        moment.append((np.arange(quota) + jitter) / quota)
    # Stable, or equal moments would fall as the machine's sort pleases.
    order_N = np.argsort(np.concatenate(moment), kind="stable")
    document_N, reference_N = np.concatenate(document)[order_N], np.concatenate(reference)[order_N]
    targets_N = corpus.reference_lengths(document_N, reference_N).astype(np.int64)
    lengths = Lengths(sources_D[document_N].astype(np.int64), targets_N, limit)
    return Draws(np.concatenate(task)[order_N], document_N, reference_N, lengths)
