"""Which evaluation examples hold which n-gram: sorted arrays on disk, built bucket by bucket.

What enters: the rows of a bench's evaluation files. What leaves: a folder of mapped arrays.

    three rows, n-grams {a, b}, {b, c}, {c}
    ->  hashes a b c      starts 0 1 3 5      rows 0 | 0 1 | 1 2      (each n-gram's rows)

Building appends (hash, row) to 128 files by the first bits of the hash and sorts one after the other, so that
memory is that of one of them. A Bloom-like table of bits answers nearly all look-ups of absent n-grams
without touching the hashes.

Suffixes: U distinct n-grams, R evaluation rows, Q hashes looked up.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.contamination.ngrams import Hashes

# 128 buckets are open at once while rows come in; macOS lets a process have 256 files.
BUCKET_BITS = 7
PAIR = np.dtype([("hash", "<u8"), ("row", "<u4")])
# One in 16 bits is set at most, so that one absent n-gram in 16 is looked up in vain.
FILTER_BITS_PER_NGRAM = 16
# An n-gram in more rows of one task than this share, and than this number, is the task's own template.
TEMPLATE_SHARE = 0.05
TEMPLATE_ROWS = 4
SLICE = 1 << 14


class IndexBuilder:
    """Takes hashes row by row, then writes the index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buckets = folder / "buckets"
        shutil.rmtree(self._buckets, ignore_errors=True)
        self._buckets.mkdir(parents=True)
        self._files = [(self._buckets / f"{number:03d}").open("wb") for number in range(1 << BUCKET_BITS)]

    def add(self, hashes_Q: Hashes, rows_Q: NDArray[np.int64]) -> None:
        """Add n-grams and the rows they are in; repeats do no harm."""
        # By hash, so that the pairs of a bucket lie together: one write a bucket.
        order = np.argsort(hashes_Q)
        pairs = np.empty(len(hashes_Q), dtype=PAIR)
        pairs["hash"], pairs["row"] = hashes_Q[order], rows_Q[order]
        edges = np.arange(1 << BUCKET_BITS, dtype=np.uint64) << np.uint64(64 - BUCKET_BITS)
        # Where each bucket's first hash could stand: the highest bits number the buckets.
        starts = [*np.searchsorted(pairs["hash"], edges).tolist(), len(pairs)]
        for file, start, stop in zip(self._files, starts, starts[1:], strict=False):
            file.write(pairs[start:stop].tobytes())

    def finish(self, first_rows: NDArray[np.int64], tasks: NDArray[np.int64]) -> None:
        """Sort and write everything.

        Args:
            first_rows: the first row of every file, and the end, [files + 1].
            tasks: the number of every file's task, [files]; validation and test share their templates.
        """
        for bucket in self._files:
            bucket.close()
        names = ("hashes", "counts", "rows", "templates")
        parts: dict[str, BinaryIO] = {name: (self._folder / f"{name}.partial").open("wb") for name in names}
        # Bucket after bucket is hash after hash, so what is written is sorted as a whole.
        for number in range(1 << BUCKET_BITS):
            pairs = _distinct(np.fromfile(self._buckets / f"{number:03d}", dtype=PAIR))
            self._write_bucket(pairs, first_rows, tasks, parts)
        for part in parts.values():
            part.close()
        shutil.rmtree(self._buckets)
        # Only now: how many n-grams there are is known when the last bucket is sorted.
        counts = _mapped(self._folder / "counts.partial", "<u4")
        starts = np.lib.format.open_memmap(self._folder / "starts.npy", "w+", "<i8", (len(counts) + 1,))
        starts[0] = 0
        np.cumsum(counts, dtype=np.int64, out=starts[1:])
        starts.flush()
        _write_filter(self._folder / "filter.npy", _mapped(self._folder / "hashes.partial", "<u8"))
        # Under their names last: the caller's record, written after this, vouches for all of them.
        for name in names:
            (self._folder / f"{name}.partial").replace(self._folder / name)

    def _write_bucket(
        self,
        pairs: np.ndarray,
        first_rows: NDArray[np.int64],
        tasks: NDArray[np.int64],
        parts: dict[str, BinaryIO],
    ) -> None:
        hashes_U, counts_U = np.unique(pairs["hash"], return_counts=True)
        # Rows of an n-gram within one task: runs of both together.
        task_P = tasks[np.searchsorted(first_rows, pairs["row"], side="right") - 1]
        # P pairs of the bucket; n-gram and task in one number, which np.unique then counts.
        ngram_P = np.repeat(np.arange(len(hashes_U)), counts_U)
        runs, rows_of_run = np.unique(ngram_P * len(first_rows) + task_P, return_counts=True)
        # Of validation and test together: they show one instruction.
        rows_of_task = np.bincount(tasks, weights=np.diff(first_rows))
        common = exceeds_template(rows_of_run, rows_of_task[runs % len(first_rows)])
        templates_U = np.zeros(len(hashes_U), dtype=np.uint8)
        templates_U[runs[common] // len(first_rows)] = 1
        parts["hashes"].write(hashes_U.tobytes())
        parts["counts"].write(counts_U.astype("<u4").tobytes())
        parts["rows"].write(np.ascontiguousarray(pairs["row"]).tobytes())
        parts["templates"].write(templates_U.tobytes())


@dataclass(frozen=True, eq=False)
class NgramIndex:
    """The index of a folder, mapped."""

    hashes_U: Hashes
    starts_U: NDArray[np.int64]
    """First of every n-gram's `rows`, [U+1]."""
    rows: NDArray[np.uint32]
    is_template_U: NDArray[np.bool_]
    """Whether an n-gram is in so many rows of a task that it must be the task's prompt; after
    `settle_templates` also whether it reaches into one."""
    bits: NDArray[np.uint8]

    @classmethod
    def open(cls, folder: Path) -> "NgramIndex":
        """Map what `IndexBuilder` wrote."""
        return cls(
            _mapped(folder / "hashes", "<u8"),
            np.load(folder / "starts.npy", mmap_mode="r"),
            _mapped(folder / "rows", "<u4"),
            _mapped(folder / ("settled" if (folder / "settled").is_file() else "templates"), "<u1").view(
                bool
            ),
            np.load(folder / "filter.npy", mmap_mode="r"),
        )

    def find(self, hashes_Q: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the hashes are n-grams of evaluation: their places in `hashes_Q`, and their numbers."""
        # The number of bits is a power of two, so the mask is the remainder.
        bit_Q = hashes_Q & np.uint64(len(self.bits) * 8 - 1)
        maybe = np.flatnonzero(
            self.bits[bit_Q >> np.uint64(3)] >> (bit_Q & np.uint64(7)).astype(np.uint8) & 1
        )
        number = np.searchsorted(self.hashes_U, hashes_Q[maybe])
        # Past the end; any number in range will do, since the next line compares.
        number[number == len(self.hashes_U)] = 0
        found = self.hashes_U[number] == hashes_Q[maybe]
        return maybe[found], number[found]

    def holders(self, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield n-grams and the rows that hold them, pair by pair in two arrays, in slices."""
        # An n-gram of a template has as many rows as its task: all at once would not be bounded.
        for start in range(0, len(numbers), SLICE):
            some = numbers[start : start + SLICE]
            counts = self.starts_U[some + 1] - self.starts_U[some]
            ends = np.cumsum(counts)
            # Every n-gram's stretch of `rows`, end to end.
            places = np.arange(ends[-1]) + np.repeat(self.starts_U[some] - (ends - counts), counts)
            yield np.repeat(some, counts), self.rows[places].astype(np.int64)

    def rows_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The distinct rows that hold any of these n-grams, sorted."""
        held = [np.unique(rows) for _, rows in self.holders(numbers)]
        return np.unique(np.concatenate([np.empty(0, np.int64), *held]))


def _distinct(pairs: np.ndarray) -> np.ndarray:
    """Sorted and without repeats; by columns, since numpy sorts whole records an order slower."""
    pairs = pairs[np.lexsort((pairs["row"], pairs["hash"]))]
    is_new = np.ones(len(pairs), dtype=bool)
    is_new[1:] = (np.diff(pairs["hash"]) != 0) | (np.diff(pairs["row"]) != 0)
    return np.asarray(pairs[is_new])


def settle_templates(
    folder: Path,
    templates: Iterable[NDArray[np.int64]],
    evaluation: Iterable[tuple[Hashes, NDArray[np.int64]]],
    n: int,
) -> None:
    """Write once and for all which n-grams are templates, or reach into one.

    Args:
        folder: of the index.
        templates: numbers of n-grams that are templates of training tasks.
        evaluation: n-grams of the evaluation rows in their order, and the number of each one's text.
        n: words of an n-gram.
    """
    index = NgramIndex.open(folder)
    partial = folder / "settled.partial"
    shutil.copyfile(folder / "templates", partial)
    # An empty file cannot be mapped for writing either.
    if not len(index.hashes_U):
        partial.replace(folder / "settled")
        return
    settled_U = np.memmap(partial, dtype="<u1", mode="r+")
    for numbers in templates:
        settled_U[numbers] = 1
    # A copy: n-grams that reach into a template must not become templates for their neighbours in turn.
    template_U = settled_U.copy()
    for hashes_G, text_G in evaluation:
        # Every n-gram of evaluation is in the index: the places are all of them.
        _, number_G = index.find(hashes_G)
        settled_U[number_G[_reaches_into(template_U[number_G] > 0, text_G, n)]] = 1
    settled_U.flush()
    partial.replace(folder / "settled")


def _reaches_into(template_G: NDArray[np.bool_], text_G: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    """Whether an n-gram has a word in common with a template of its own text."""
    place_G = np.arange(len(template_G))
    # N-grams less than n places apart have a word in common, if they are of one text.
    first_G = np.maximum(place_G - n + 1, np.searchsorted(text_G, text_G, side="left"))
    stop_G = np.minimum(place_G + n, np.searchsorted(text_G, text_G, side="right"))
    before = np.concatenate([[0], np.cumsum(template_G)])
    return np.asarray(before[stop_G] > before[first_G])


def exceeds_template(rows_holding: NDArray, rows: NDArray | int) -> NDArray[np.bool_]:
    """Whether n-grams are in too many of a task's rows to be of single examples."""
    return np.asarray(rows_holding > np.maximum(TEMPLATE_ROWS, TEMPLATE_SHARE * rows))


def _write_filter(path: Path, hashes_U: Hashes) -> None:
    bits = max(64, 1 << int(np.ceil(np.log2(max(len(hashes_U), 1) * FILTER_BITS_PER_NGRAM))))
    table = np.lib.format.open_memmap(path, "w+", "u1", (bits // 8,))
    for start in range(0, len(hashes_U), 1 << 20):
        bit = hashes_U[start : start + (1 << 20)] & np.uint64(bits - 1)
        # Not `table[...] |= ...`, which sets only one of several bits in a byte.
        np.bitwise_or.at(table, bit >> np.uint64(3), np.uint8(1) << (bit & np.uint64(7)).astype(np.uint8))
    table.flush()


def _mapped(path: Path, dtype: str) -> np.ndarray:
    # A file without bytes cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
