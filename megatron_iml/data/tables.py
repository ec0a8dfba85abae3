"""Rows of a data set as people keep them: JSON Lines, a JSON array, CSV, TSV or Parquet.

What enters: one file. What leaves: its rows as dictionaries, each with the number of its line (of its
record, where a file has no lines).

    rows.csv "question,answer\\n\\"2, 3?\\",5\\n"  ->  (2, {"question": "2, 3?", "answer": "5"})
    rows.json '[{"a": 1}]' or '{"a": 1}\\n'       ->  (1, {"a": 1})

Official files called .json are often JSON Lines (AQuA, CREAK); the first character tells.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_iml.data.ledger import Drops
from megatron_iml.data.text_files import json_lines, json_value, source_files, text_lines

Row = tuple[int, dict[str, Any]]
# Cells of 100,000 characters hold whole tables and articles; csv's own limit is 131,072.
LONGEST_CELL = 1 << 24
ROW_NUMBERS = frozenset({"id", "idx", "guid", "uid"})


def table_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, its kind known by the suffix.

    Raises:
        ValueError: another suffix; a malformed line, by its number; Parquet without its package.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: no table; give one of {', '.join(KINDS)}")
    yield from KINDS[path.suffix](path)


def table_files(folder: Path, pattern: str, drops: Drops) -> list[Path]:
    """Tables of `folder` whose path without suffix matches the glob `pattern`; empty files are left out."""
    return [path for path in source_files(folder, f"{pattern}.*", drops) if path.suffix in KINDS]


def row_key(row: Mapping[str, Any]) -> str:
    """What a row says, so that its copies are known: two templates may make two prompts of them.

    Numbers that a data set gives its rows say nothing.
    """
    content = {name: value for name, value in row.items() if name not in ROW_NUMBERS}
    # Parquet also holds dates and bytes, which JSON has not.
    # Sorted: copies of a row may hold its columns in another order.
    return json.dumps(content, sort_keys=True, default=str)


def separated_lines(path: Path, separator: str = "\t") -> Iterator[tuple[int, list[str]]]:
    """Columns of each line of a file without header and without quoting; blank lines are passed over."""
    for number, line in text_lines(path):
        if line.strip():
            yield number, line.split(separator)


def csv_records(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV file with quoting, numbered by the line they end on; a cell may hold newlines."""
    # For the whole process: csv knows no limit of one reader.
    csv.field_size_limit(LONGEST_CELL)
    # With their ends again, which belong to cells that run over several lines.
    lines = (line + "\n" for _, line in text_lines(path))
    # Strict: a quote that is never closed would take the rest of the file into one cell.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if record:
                yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV ({error}); fix the line") from error


def _json(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"["):
        yield from json_lines(path)
        return
    for number, row in enumerate(json_value(path), start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: record {number} is a JSON {type(row).__name__}; expected an object {{...}}"
            )
        yield number, row


def _csv(path: Path) -> Iterator[Row]:
    return _with_header(path, ",")


def _tsv(path: Path) -> Iterator[Row]:
    return _with_header(path, "\t")


def _with_header(path: Path, delimiter: str) -> Iterator[Row]:
    records = csv_records(path, delimiter)
    # Without a header there are no records either.
    _, header = next(records, (0, []))
    for number, record in records:
        if len(record) != len(header):
            raise ValueError(
                f"{path}:{number}: {len(record)} cells under a header of {len(header)}; quote or fix the line"
            )
        yield number, dict(zip(header, record, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        # Here, since the package is optional.
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow; run: pip install 'megatron-iml[parquet]'") from error
    number = 0
    # In batches: memory stays at one, however large the file.
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


KINDS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".jsonlines": json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
