from pathlib import Path

import pytest

from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.text_files import (
    as_text,
    as_texts,
    json_lines,
    json_object,
    source_files,
    text_lines,
    yaml_mapping,
)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_end_at_newline_only(tmp_path):
    path = write(tmp_path / "a.tsv", "one\u2028still one\x0b\x85\r\n\ttwo\n".encode())
    assert list(text_lines(path)) == [(1, "one\u2028still one\x0b\x85"), (2, "\ttwo")]


def test_byte_order_mark_goes_at_the_start_and_stays_elsewhere(tmp_path):
    path = write(tmp_path / "a.tsv", b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert list(text_lines(path)) == [(1, "one"), (2, "\ufefftwo")]


def test_json_lines_keep_their_numbers_over_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "x\\u2028y\\u0000"}')
    assert list(json_lines(path)) == [(1, {"a": 1}), (4, {"a": "x\u2028y\0"})]


def test_python_json_with_nan_is_read(tmp_path):
    path = write(tmp_path / "a.json", b'{"URL": [NaN], "a": 1}')
    assert json_object(path)["a"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "caf\xe9"}', r"a.jsonl:2: not UTF-8 \(byte 0xe9 at offset 10\); re-encode the file"),
        (b'{"a": 1', r"a.jsonl:2: not valid JSON \(.*\); expected an object"),
        (rb'{"a": "\ud83d"}', r"a.jsonl:2: a text holds half a surrogate pair"),
        (b"[1]", r"a.jsonl:2: got a JSON list, expected an object"),
    ],
)
def test_a_line_that_is_no_object_names_its_place(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(json_lines(path))


def test_text_that_is_not_utf8_names_its_line(tmp_path):
    path = write(tmp_path / "a.tsv", b"fine\nbad \xff\n")
    with pytest.raises(ValueError, match=r"a.tsv:2: not UTF-8 \(byte 0xff at offset 4\)"):
        list(text_lines(path))


def test_scalars_become_text_and_are_counted():
    counts = TaskCounts()
    values = ["x", True, 7, 0.5, None, {"a": 1}, float("nan")]
    assert [as_text(value, counts) for value in values] == ["x", "True", "7", "0.5", None, None, None]
    assert counts.repaired == {
        "bool turned into text": 1,
        "int turned into text": 1,
        "float turned into text": 1,
    }


def test_a_list_with_one_part_that_is_no_text_is_refused_whole():
    counts = TaskCounts()
    assert as_texts("one", counts) == ("one",)
    assert as_texts(["a", 2], counts) == ("a", "2")
    assert as_texts([], counts) == ()
    assert as_texts(["a", None], counts) is None
    assert as_texts(None, counts) is None


def test_empty_files_are_recorded_and_the_rest_is_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl", b"{}\n")
    write(tmp_path / "sub" / "a.jsonl", b"{}\n")
    write(tmp_path / "sub" / "zero.jsonl", b"")
    drops = Drops(tmp_path)
    found = source_files(tmp_path, "**/*.jsonl", drops)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b.jsonl", "sub/a.jsonl"]
    assert drops.skipped_files == {"sub/zero.jsonl": "empty file"}


def test_missing_and_wrong_folders_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source folder"):
        source_files(tmp_path / "absent", "*.json", Drops())
    with pytest.raises(ValueError, match=r"no file matches \*.json"):
        source_files(tmp_path, "*.json", Drops())


def test_yaml_faults_fit_on_one_line(tmp_path):
    with pytest.raises(ValueError, match="not YAML") as error:
        yaml_mapping(write(tmp_path / "a.yaml", b"a: [1\nb: 2"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got a YAML list, expected keys and values"):
        yaml_mapping(write(tmp_path / "b.yaml", b"- 1"))
