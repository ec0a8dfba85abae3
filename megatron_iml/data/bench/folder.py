"""The bench folder: all benchmarks in one form, with the account of where everything went.

What enters: a folder written by `writer.py`. What leaves: its files with their task, category,
level and split, their rows one by one, and a check of the whole.

    bench/manifest.json   {"format_version": 2, "seed": 1, "splits": {...}, "files": [{"task": ...}, ...]}
    bench/ledger.json     {"tasks": {"NIV2__Misc.__task1146": {"read": 200, "written": {...}, ...}}}
    bench/train/NIV2__Misc.__task1146_country_capital.jsonl
        {"id": "task1146-0", "src": "Instructions: ...\\nInput: Togo\\nAnswer:", "tgt": "Lome"}

A file name is `<benchmark>__<category>__<task>`; only the task may contain "__", so `split("__", 2)`
takes it apart.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import orjson

from megatron_iml.data.bench.splits import LEVELS, SPLITS, Level, Split
from megatron_iml.data.example import METRICS, Metric
from megatron_iml.data.manifest import MANIFEST, read_manifest
from megatron_iml.data.text_files import json_lines, json_object

FORMAT_VERSION = 2
MANIFEST_KEYS = frozenset({"format_version", "seed", "files"})
LEDGER = "ledger.json"
# Most file systems allow 255 bytes; the suffix and our own temporary names take some.
LONGEST_STEM_BYTES = 230
# What may not stand in a file name: blanks, path separators, control characters, and what shells expand.
UNSAFE = re.compile(r"[\s/\\:*?\"<>|\x00-\x1f\x7f-\x9f]+")


class BenchRow(TypedDict):
    """One row of a bench file."""

    id: str
    src: str
    tgt: str
    references: NotRequired[list[str]]
    candidates: NotRequired[list[str]]
    instruction: NotRequired[int]
    """Characters of `src` that demonstrations stand after; absent, they stand before `src`."""


@dataclass(frozen=True, slots=True)
class BenchFile:
    """One entry of the manifest: the rows of one task in one split."""

    task: str
    benchmark: str
    category: str
    level: Level
    split: Split
    examples: int
    metric: Metric
    sha256: str
    file: str
    """Path relative to the bench folder."""
    parent: str = ""
    """The task of which this is a part, or which other benchmarks have as well; empty for one of its own."""

    @property
    def stem(self) -> str:
        """`<benchmark>__<category>__<task>`: the key of the task in the ledger."""
        return Path(self.file).name.removesuffix(".jsonl")


def file_stem(benchmark: str, category: str, task: str) -> str:
    """File name of a task without suffix; safe inside a folder whatever the names hold.

    Raises:
        ValueError: a name is blank or the whole is too long.
    """
    # "__" separates the parts, so benchmark and category may neither hold it nor end in its half.
    safe = [re.sub("_+", "_", UNSAFE.sub("_", part)).strip("_") for part in (benchmark, category)]
    # A task may hold "__" and often does: readers split twice at most.
    safe.append(UNSAFE.sub("_", task))
    stem = "__".join(safe)
    # A name of nothing but unsafe characters is blank by now, too.
    if not all(part.strip("_") for part in safe):
        raise ValueError(
            f"no file name for benchmark {benchmark!r}, category {category!r}, task {task!r}: one is blank"
        )
    if len(stem.encode()) > LONGEST_STEM_BYTES:
        raise ValueError(
            f"name of task {task!r} is too long for a file: {stem!r}; at most {LONGEST_STEM_BYTES} bytes"
        )
    return stem


@dataclass(frozen=True)
class Bench:
    """A bench folder, opened."""

    folder: Path
    seed: int
    fingerprint: str
    """SHA-256 of the manifest, which holds the SHA-256 of every file."""
    entries: tuple[BenchFile, ...]

    @classmethod
    def open(cls, folder: Path) -> "Bench":
        """Read the manifest; the rows are read by `rows`.

        Raises:
            FileNotFoundError: no manifest.
            ValueError: the manifest is not one of this version.
        """
        manifest = read_manifest(folder, "bench", FORMAT_VERSION, MANIFEST_KEYS, "build_bench.py")
        path = folder / MANIFEST
        entries = tuple(_entry(path, index, entry) for index, entry in enumerate(manifest["files"]))
        # Of the bytes, not of the content: a manifest edited by hand is another bench.
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(folder, manifest["seed"], fingerprint, entries)

    def files(self, split: Split | None = None, level: Level | None = None) -> list[BenchFile]:
        """Files of a split and a level, all of them unless named, in the order of the manifest."""
        for value, allowed in ((split, SPLITS), (level, LEVELS)):
            if value is not None and value not in allowed:
                raise ValueError(f"no split or level {value!r} in a bench; choose from {', '.join(allowed)}")
        return [
            entry for entry in self.entries if split in (None, entry.split) and level in (None, entry.level)
        ]

    def path(self, entry: BenchFile) -> Path:
        """Where the file of an entry lies. Raises FileNotFoundError if it is gone."""
        path = self.folder / entry.file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is in the manifest but not on disk; build the bench anew")
        return path

    def rows(self, entry: BenchFile) -> Iterator[BenchRow]:
        """Rows of a file in their order; a malformed one is a `ValueError` with file and line."""
        path = self.path(entry)
        for number, row in json_lines(path):
            yield _checked_row(path, number, row)

    def ledger(self) -> dict[str, Any]:
        """Accounts of all tasks, keyed by `BenchFile.stem`, and the files that were skipped."""
        return json_object(self.folder / LEDGER)


def verify_bench(folder: Path) -> Bench:
    """Read a whole bench again: checksums, row counts, the ledger, and that no file is extra.

    Raises:
        ValueError: the first thing found that does not agree, with both values.
    """
    bench = Bench.open(folder)
    tasks = bench.ledger()["tasks"]
    on_disk = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.jsonl")}
    # First, for a glob over the folder would train on such a file.
    if extra := on_disk - {entry.file for entry in bench.entries}:
        raise ValueError(
            f"{folder}: {len(extra)} files are not in the manifest, e.g. {min(extra)}; remove them"
        )
    for entry in bench.entries:
        # Read as rows, so that each of them is checked.
        rows = sum(1 for _ in bench.rows(entry))
        with bench.path(entry).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for what, found, expected in (
            ("rows", rows, entry.examples),
            ("SHA-256", sha256, entry.sha256),
            ("rows in the ledger", tasks[entry.stem]["written"].get(entry.split), entry.examples),
        ):
            if found != expected:
                raise ValueError(f"{entry.file}: {what} {found}, expected {expected}; build the bench anew")
    for name, counts in tasks.items():
        accounted = sum(counts["written"].values()) + sum(counts["dropped"].values())
        if counts["read"] != accounted:
            raise ValueError(
                f"{LEDGER}: {name} read {counts['read']} but accounts for {accounted}; build the bench anew"
            )
    return bench


def _entry(path: Path, index: int, entry: dict[str, Any]) -> BenchFile:
    # Exactly these: a missing or unknown key is a bench of another version.
    expected = {field.name for field in fields(BenchFile)}
    if set(entry) != expected:
        raise ValueError(
            f"{path}: file {index} has the keys {sorted(entry)}, expected {sorted(expected)}; build it anew"
        )
    for key, allowed in (("level", LEVELS), ("split", SPLITS), ("metric", METRICS)):
        if entry[key] not in allowed:
            raise ValueError(
                f"{path}: file {index} has {key} {entry[key]!r}; choose from {', '.join(allowed)}"
            )
    # The promise of the whole bench, so it is checked where every reader passes.
    if entry["split"] == "train" and entry["level"] != "fully_supervised":
        raise ValueError(
            f"{path}: file {index} trains on the {entry['level']} task {entry['task']!r}; build it anew"
        )
    return BenchFile(**entry)


def _checked_row(path: Path, number: int, row: dict[str, Any]) -> BenchRow:
    # Row by row, for whoever reads rows like this compares no digest.
    for key in ("id", "src", "tgt"):
        if not isinstance(row.get(key), str):
            got = f"`{key}` is {row[key]!r}" if key in row else f"no `{key}`"
            raise ValueError(
                f"{path}:{number}: {got}; a bench row needs the texts id, src and tgt; fix or remove it"
            )
    for key in ("references", "candidates"):
        values = row.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{path}:{number}: `{key}` is {values!r}; it must be a list of texts; fix or remove it"
            )
    # Not isinstance: `true` would pass.
    if type(row.get("instruction", 0)) is not int:
        raise ValueError(
            f"{path}:{number}: `instruction` is {row['instruction']!r}; it must be a number of characters"
        )
    # Other keys pass: a bench from elsewhere may carry its own.
    return BenchRow(**row)  # type: ignore[typeddict-item]


def manifest_bytes(seed: int, splits: dict[str, Any], entries: list[BenchFile]) -> bytes:
    """The manifest file: equal inputs give equal bytes, so it names neither times nor machines."""
    content = {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "splits": splits,
        "files": [asdict(entry) for entry in entries],
    }
    return orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"
