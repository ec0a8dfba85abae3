"""Which training tasks share runs of words with which evaluation tasks: OPT-IML's 13-gram overlap.

What enters: a bench. What leaves: a folder with an index of the evaluation rows' n-grams, what every training
file shares with it, a report with examples and a decision file (`report.py`).

    test/B__C__quiz.jsonl, 100 rows of which 7 share a 13-gram with train/A__D__trivia.jsonl, 4 of them one
    that is no template of the quiz   ->   Pair(shared=7, specific=4): over the threshold of 1 %

A row is compared as it is instantiated: prompt, target, further references. An n-gram that more than a
twentieth of a task's rows hold, on either side, is that task's template (instruction text). `shared` counts
rows with any common n-gram, as the paper does; `specific` those with one that has no word in common with a
template, so not the end of an instruction with the first word of an input either. Every row is
read once, n-grams of evaluation lie in sorted arrays on disk, and of a training file no more is kept than
which of them it holds: time is linear, memory bounded. A killed search keeps the files it has finished.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_iml.data.bench.chunks import read_chunks
from megatron_iml.data.bench.folder import Bench, BenchFile
from megatron_iml.data.contamination.index import IndexBuilder, NgramIndex, exceeds_template, settle_templates
from megatron_iml.data.contamination.ngrams import Hashes, NgramHasher
from megatron_iml.data.jobs import claim, finished_record, worker_pool, write_json
from megatron_iml.data.text_files import json_object

# An n-gram of the index that a training file holds: where in the file its first row begins, and in how many
# rows it is.
HIT = np.dtype([("ngram", "<i8"), ("offset", "<i8"), ("rows", "<i8")])
INDEX_RECORD = "index.json"


@dataclass(frozen=True, slots=True)
class Search:
    """What is compared, and where the findings lie."""

    bench: Path
    output: Path
    ngram: int = 13
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Pair:
    """A training and an evaluation file, and the evaluation rows that the training file shares."""

    training: BenchFile
    evaluation: BenchFile
    shared: int
    """Rows with any common n-gram."""
    specific: int
    """Rows with a common n-gram outside the templates of all tasks."""


class Findings:
    """A finished search: the index, its evaluation files, and the hits of every training file."""

    def __init__(self, folder: Path, bench: Bench) -> None:
        record = json_object(folder / INDEX_RECORD)
        self.folder = folder
        self.bench = bench
        self.ngram: int = record["origin"]["ngram"]
        self.rows_too_short: dict[str, int] = record["rows_too_short"]
        """Rows of every evaluation file that have fewer words than an n-gram, so cannot be compared."""
        self.evaluation = evaluation_files(bench)
        # Rows are numbered through all evaluation files, in the order of the bench.
        self.first_rows: NDArray[np.int64] = np.cumsum([0] + [entry.examples for entry in self.evaluation])
        self.index = NgramIndex.open(folder / "index")
        self.offsets_R: NDArray[np.int64] = np.load(folder / "index" / "offsets.npy", mmap_mode="r")
        """Where every evaluation row begins in its file."""

    def hits(self, training: BenchFile) -> np.ndarray:
        """What a training file holds of the index, HIT, sorted by n-gram."""
        return np.asarray(np.load(_hits_path(self.folder, training)))

    def specific_hits(self, training: BenchFile) -> np.ndarray:
        """Those hits that reach into no template."""
        hits = self.hits(training)
        return np.asarray(hits[~self.index.is_template_U[hits["ngram"]]])

    def files_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each row's file in `evaluation`."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def pairs(self) -> Iterator[Pair]:
        """All pairs that share anything, in the order of the bench."""
        for training in self.bench.files("train"):
            ngrams = self.hits(training)["ngram"]
            if not len(ngrams):
                continue
            specific = self.specific_hits(training)["ngram"]
            # F evaluation files.
            shared_F, specific_F = (
                # A row counts once, however many of the n-grams it holds.
                np.bincount(self.files_of(self.index.rows_of(some)), minlength=len(self.evaluation))
                for some in (ngrams, specific)
            )
            for number in np.flatnonzero(shared_F).tolist():
                yield Pair(training, self.evaluation[number], int(shared_F[number]), int(specific_F[number]))


def evaluation_files(bench: Bench) -> list[BenchFile]:
    """The files that nothing may be trained on."""
    return [*bench.files("validation"), *bench.files("test")]


def find_contamination(
    search: Search, start: Callable[[int], None], advance: Callable[[int], None]
) -> Findings:
    """Search a bench; what an earlier search of the same finished is kept.

    `start` hears the number of rows to be read, `advance` those of every file done. Raises ValueError for a
    bench without training or evaluation files, a changed file, or findings of something else in the output.
    """
    bench = Bench.open(search.bench)
    training, evaluation = bench.files("train"), evaluation_files(bench)
    if not training or not evaluation:
        raise ValueError(
            f"{search.bench} has {len(training)} training and {len(evaluation)} evaluation files, one of "
            "each is needed; build it with a splits file that gives both"
        )
    start(sum(entry.examples for entry in (*training, *evaluation)))
    with claim(search.output):
        _search(search, bench, advance)
    return Findings(search.output, bench)


def _search(search: Search, bench: Bench, advance: Callable[[int], None]) -> None:
    _build_index(search, bench, advance)
    (search.output / "hits").mkdir(exist_ok=True)
    missing = []
    for entry in bench.files("train"):
        # It was renamed to its name when it was whole, so it needs no record.
        if _hits_path(search.output, entry).is_file():
            advance(entry.examples)
        else:
            missing.append(entry)
    with worker_pool(search.workers) as pool:
        if pool is None:
            index, hasher = NgramIndex.open(search.output / "index"), NgramHasher(search.ngram)
            for entry in missing:
                advance(_scan(bench, entry, search.output, index, hasher))
        else:
            futures = [
                pool.submit(_scan_in_worker, bench, entry, search.output, search.ngram) for entry in missing
            ]
            for future in futures:
                advance(future.result())
    if not (search.output / "index" / "settled").is_file():
        _settle(search, bench)


def _settle(search: Search, bench: Bench) -> None:
    """Templates need the rows of both sides, so they are known when everything is read."""
    hasher = NgramHasher(search.ngram)
    # One after the other: together they may not fit memory.
    hits = ((entry, np.load(_hits_path(search.output, entry))) for entry in bench.files("train"))
    settle_templates(
        search.output / "index",
        # In how many rows of this training file: the same measure as for evaluation, on the other side.
        (found["ngram"][exceeds_template(found["rows"], entry.examples)] for entry, found in hits),
        (
            (piece.hashes_G, piece.text_G)
            for entry in evaluation_files(bench)
            for piece in rows_with_ngrams(bench, entry, hasher)
        ),
        search.ngram,
    )


def open_findings(folder: Path, bench: Bench) -> Findings:
    """The findings of a finished search of this bench.

    Raises FileNotFoundError without any, ValueError for those of another bench.
    """
    # The last file that a search writes: without it the search was killed.
    if not (folder / INDEX_RECORD).is_file() or not (folder / "index" / "settled").is_file():
        raise FileNotFoundError(
            f"no finished findings in {folder}; run tools/preprocess/find_contamination.py first"
        )
    fingerprint = json_object(folder / INDEX_RECORD)["origin"]["bench_fingerprint"]
    if fingerprint != bench.fingerprint:
        raise ValueError(
            f"{folder} was made from another bench than {bench.folder}; run "
            "tools/preprocess/find_contamination.py on this one"
        )
    return Findings(folder, bench)


def rows_with_ngrams(bench: Bench, entry: BenchFile, hasher: NgramHasher) -> Iterator["RowNgrams"]:
    """The n-grams of a file, some thousand rows at a time."""
    first = position = 0
    for chunk in read_chunks(bench, entry):
        lines = chunk.data.removesuffix(b"\n").split(b"\n")
        texts, owners = [], []
        for number, line in enumerate(lines):
            own = row_texts(orjson.loads(line))
            texts.extend(own)
            owners.extend([number] * len(own))
        hashes_G, text_G = hasher.hashes(texts)
        # And the line feed that the split took.
        lengths = np.fromiter(map(len, lines), np.int64, len(lines)) + 1
        offsets = position + np.cumsum(lengths) - lengths
        # From numbers of texts to numbers of rows.
        yield RowNgrams(first, offsets, hashes_G, text_G, np.array(owners)[text_G])
        first += len(lines)
        position += len(chunk.data)


@dataclass(frozen=True, slots=True, eq=False)
class RowNgrams:
    """The n-grams of successive rows of a file."""

    first_row: int
    offsets: NDArray[np.int64]
    """Where every row begins in the file."""
    hashes_G: Hashes
    text_G: NDArray[np.int64]
    """The text of each n-gram; a row with several references has several."""
    row_G: NDArray[np.int64]
    """The row of each n-gram, counted from `first_row`."""


def row_texts(row: dict) -> list[str]:
    """A bench row as it is instantiated, and its further references."""
    # The first reference is `tgt`.
    return [f"{row['src']} {row['tgt']}", *row.get("references", [])[1:]]


def _build_index(search: Search, bench: Bench, advance: Callable[[int], None]) -> None:
    origin = {"bench_fingerprint": bench.fingerprint, "ngram": search.ngram}
    record = search.output / INDEX_RECORD
    evaluation = evaluation_files(bench)
    if finished_record(record, origin) is not None:
        advance(sum(entry.examples for entry in evaluation))
        return
    if record.is_file():
        raise ValueError(
            f"{search.output} holds findings of another bench or n-gram; remove it or give another --output"
        )
    builder, hasher = IndexBuilder(search.output / "index"), NgramHasher(search.ngram)
    offsets, too_short, first = [], {}, 0
    for entry in evaluation:
        compared = 0
        for piece in rows_with_ngrams(bench, entry, hasher):
            builder.add(piece.hashes_G, piece.row_G + piece.first_row + first)
            offsets.append(piece.offsets)
            # A row without an n-gram does not occur.
            compared += len(np.unique(piece.row_G))
        too_short[entry.file] = entry.examples - compared
        first += entry.examples
        advance(entry.examples)
    # A number a task, and not a file: validation and test of a task share it.
    stems = {stem: number for number, stem in enumerate(dict.fromkeys(entry.stem for entry in evaluation))}
    first_rows = np.cumsum([0] + [entry.examples for entry in evaluation])
    builder.finish(first_rows, np.array([stems[entry.stem] for entry in evaluation]))
    np.save(search.output / "index" / "offsets.npy", np.concatenate(offsets))
    write_json(record, {"origin": origin, "rows_too_short": too_short})


@cache
def _tools_of_worker(folder: Path, ngram: int) -> tuple[NgramIndex, NgramHasher]:
    """Opened once per worker: its memory of words serves all files."""
    return NgramIndex.open(folder / "index"), NgramHasher(ngram)


def _scan_in_worker(bench: Bench, entry: BenchFile, folder: Path, ngram: int) -> int:
    # In workers alone, which end with their search: the folder may hold another index at the next one.
    return _scan(bench, entry, folder, *_tools_of_worker(folder, ngram))


def _scan(bench: Bench, entry: BenchFile, folder: Path, index: NgramIndex, hasher: NgramHasher) -> int:
    """Write the hits of one training file; return its rows."""
    found = np.empty(0, dtype=HIT)
    for piece in rows_with_ngrams(bench, entry, hasher):
        places, numbers = index.find(piece.hashes_G)
        # N-gram and row of the piece in one number: an n-gram twice in a row counts once.
        distinct = np.unique(numbers * len(piece.offsets) + piece.row_G[places])
        hits = np.empty(len(distinct), dtype=HIT)
        hits["ngram"] = distinct // len(piece.offsets)
        hits["offset"] = piece.offsets[distinct % len(piece.offsets)]
        hits["rows"] = 1
        # Piece by piece, or an instruction would be held once for every row of the file.
        found = _merged(np.concatenate([found, hits]))
    path = _hits_path(folder, entry)
    partial = path.with_name(path.name + ".partial")
    # Through a file, since np.save adds `.npy` to a path that does not end so.
    with partial.open("wb") as file:
        np.save(file, found)
    partial.replace(path)
    return entry.examples


def _merged(hits: np.ndarray) -> np.ndarray:
    """One hit for each n-gram: its first offset, all its rows."""
    # The first row of each is enough to show; which other rows hold it is asked where it is removed.
    ngrams, first, which = np.unique(hits["ngram"], return_index=True, return_inverse=True)
    merged = hits[first]
    merged["rows"] = np.bincount(which, weights=hits["rows"], minlength=len(ngrams))
    return np.asarray(merged)


def _hits_path(folder: Path, training: BenchFile) -> Path:
    return folder / "hits" / f"{training.stem}.npy"
