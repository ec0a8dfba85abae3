import pytest

from megatron_iml.data.ledger import Drops
from megatron_iml.data.tables import csv_records, row_key, separated_lines, table_files, table_rows


def rows_of(tmp_path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    return list(table_rows(path))


def test_csv_quotes_newlines_and_separators_belong_to_cells(tmp_path):
    content = b'\xef\xbb\xbfa,b\r\n"1,""2""\nnext",x\r\n\n\xe2\x80\xa8,y\r\n'
    assert rows_of(tmp_path, "t.csv", content) == [
        (3, {"a": '1,"2"\nnext', "b": "x"}),
        (5, {"a": "\u2028", "b": "y"}),
    ]
    assert rows_of(tmp_path, "t.tsv", b'a\tb\n1,2\t"3"\n') == [(2, {"a": "1,2", "b": "3"})]


def test_long_cells_are_read_whole(tmp_path):
    ((_, row),) = rows_of(tmp_path, "t.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert len(row["a"]) == 200_000


def test_a_json_file_may_be_an_array_or_json_lines(tmp_path):
    assert rows_of(tmp_path, "a.json", b'\xef\xbb\xbf \n[{"a": 1}, {"a": true}]') == [
        (1, {"a": 1}),
        (2, {"a": True}),
    ]
    assert rows_of(tmp_path, "b.json", b'{"a": 1}\n\n{"a": 2}\n') == [(1, {"a": 1}), (3, {"a": 2})]


def test_copies_of_a_row_have_one_key_whatever_their_number_and_order():
    assert row_key({"id": 1, "a": "x", "b": [2]}) == row_key({"b": [2], "a": "x", "id": 7})
    assert row_key({"a": "x"}) != row_key({"a": "y"})


def test_parquet_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": ["x", None], "b": [[1, 2], []]}), tmp_path / "t.parquet")
    assert list(table_rows(tmp_path / "t.parquet")) == [
        (1, {"a": "x", "b": [1, 2]}),
        (2, {"a": None, "b": []}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a,b\n1\n", "t.csv:2: 1 cells under a header of 2; quote or fix the line"),
        ("t.csv", b'a,b\n"1,2\n', "t.csv:2: not valid CSV .unexpected end of data.; fix the line"),
        ("t.csv", b"a\n\xe9\n", "t.csv:2: not UTF-8"),
        ("t.json", b"[1]", "record 1 is a JSON int; expected an object"),
        ("t.jsonl", b"[1]\n", "t.jsonl:1: got a JSON list"),
        ("t.txt", b"", "t.txt: no table; give one of .jsonl, .jsonlines, .json, .csv, .tsv, .parquet"),
    ],
)
def test_malformed_tables_name_their_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, name, content)


def test_separated_lines_know_neither_quotes_nor_other_line_ends(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes('"a\u2028b"\t"c\n \nd\te\tf\r\n'.encode())
    assert list(separated_lines(path)) == [(1, ['"a\u2028b"', '"c']), (3, ["d", "e", "f"])]


def test_records_without_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'"What, now?",a,b\n')
    assert list(csv_records(path)) == [(1, ["What, now?", "a", "b"])]


def test_table_files_are_those_that_hold_rows(tmp_path):
    for name in ("train.csv", "train.md", "empty.jsonl"):
        (tmp_path / name).write_text("" if name.startswith("empty") else "a\n1\n")
    drops = Drops(tmp_path)
    assert [path.name for path in table_files(tmp_path, "*", drops)] == ["train.csv"]
    assert drops.skipped_files == {"empty.jsonl": "empty file"}
