"""Reads the text files of benchmarks as they are found in the wild.

What enters: UTF-8 files with all their dirt. What leaves: lines or JSON objects, each with its line
number, or a `ValueError` that says file, line, what is wrong and what to do.

    b'\\xef\\xbb\\xbf{"a": 1}\\n\\n{"a": 2}\\n'  ->  (1, {"a": 1}), (3, {"a": 2})

Lines end at "\\n" only: U+2028 and the other separators of `str.splitlines` occur inside real questions
(twice in line 2382 of GSM8K). A byte order mark counts at the start of a file and stays anywhere else;
control characters stay.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_iml.config.strict_yaml import parse_yaml
from megatron_iml.data.ledger import Drops, TaskCounts

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def source_files(folder: Path, pattern: str, drops: Drops) -> list[Path]:
    """Files of `folder` matching the glob `pattern`, sorted; empty ones are recorded and left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no source folder {folder}; give the folder that holds {pattern}")
    # Sorted: the order of a folder differs between file systems.
    matches = sorted(path for path in folder.glob(pattern) if path.is_file())
    # Nothing read would be a bench without this source, and nobody would be told.
    if not matches:
        raise ValueError(f"no file matches {pattern} in {folder}; the reader or the folder is the wrong one")
    # Such files are published: 11 of the 294 of T0's rendered prompts.
    for path in matches:
        if path.stat().st_size == 0:
            drops.skip_file(path, "empty file")
    return [path for path in matches if path.stat().st_size > 0]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file without their end, numbered from 1."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            try:
                # Not str.splitlines or text mode: both also cut at U+2028 or a lone carriage return.
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf8(f"{path}:{number}", error)) from error


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON Lines file, numbered by line from 1; blank lines are passed over."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            if not line.isspace():
                yield number, _parse_object(line, f"{path}:{number}")


def json_object(path: Path) -> dict[str, Any]:
    """The one JSON object of a file."""
    return _parse_object(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path))


def json_value(path: Path) -> Any:
    """Whatever JSON value a file holds, e.g. an array of rows."""
    return _parse(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path))


def yaml_mapping(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file; an empty file has none."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; correct the path")
    try:
        # Strict: of two lists `held_out_tasks` the first would be trained on without a word.
        content = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: got a YAML {type(content).__name__}, expected keys and values; write `key: value`"
        )
    return content


def as_text(value: object, counts: TaskCounts) -> str | None:
    """A JSON value as text; numbers and booleans are converted and counted, None for anything else."""
    if isinstance(value, str):
        return value
    # NaN is how data frames write a missing value.
    if isinstance(value, (bool, int, float)) and value == value:
        counts.repaired[f"{type(value).__name__} turned into text"] += 1
        return str(value)
    return None


def as_texts(value: object, counts: TaskCounts) -> tuple[str, ...] | None:
    """A JSON value or a list of them as texts; None if any part is neither text, number nor boolean."""
    if isinstance(value, str):
        return (value,)
    texts = [as_text(item, counts) for item in value] if isinstance(value, list) else [as_text(value, counts)]
    # All or nothing: references that lack one are not what the file says.
    present = tuple(text for text in texts if text is not None)
    return present if len(present) == len(texts) else None


def _parse_object(raw: bytes, place: str) -> dict[str, Any]:
    value = _parse(raw, place)
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: got a JSON {type(value).__name__}, expected an object {{...}}; fix or remove it"
        )
    return value


def _parse(raw: bytes, place: str) -> Any:
    try:
        # First: it is the fast one, and nearly every line passes.
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _parse_python_json(raw, place)


def _parse_python_json(raw: bytes, place: str) -> Any:
    """Python's own JSON also knows NaN, which official files hold (`"URL": [NaN]` in task603 of Super-NI)."""
    try:
        value = json.loads(raw.decode("utf-8"))
        # It also takes half a surrogate pair (a lone \ud83d), which no UTF-8 file can hold afterwards.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: a text holds half a surrogate pair; fix or remove it") from error
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(place, error)) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error}); expected an object {{...}}; fix or remove it"
        ) from error


def _not_utf8(place: str, error: UnicodeDecodeError) -> str:
    return (
        f"{place}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}); "
        "re-encode the file, e.g. iconv -f LATIN1 -t UTF-8"
    )
