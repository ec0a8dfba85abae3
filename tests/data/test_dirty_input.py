"""Every kind of dirt in one bench: what stays, what is dropped and why, and that nothing else happens."""

import json
from pathlib import Path

import pytest
from readers import write_files

from megatron_iml.data.bench.config import load_bench_config
from megatron_iml.data.bench.folder import Bench, verify_bench
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.bench.writer import build_bench
from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops

LONG = "word " * 9_500
FORTY = [f"reference {index}" for index in range(40)]
INSTANCES = [
    {"id": "long", "input": LONG, "output": ["x"]},
    {"id": "forty", "input": "a", "output": [*FORTY, FORTY[0], " "]},
    {"id": "blank", "input": "b", "output": [" \t"]},
    {"id": "signs", "input": "c\x00\x07\x1b\u0085\ufeff\ufffd\u2028\u200b\r\nd", "output": ["\ufffd e\rf"]},
    {"id": "twice", "input": "e", "output": ["first"]},
    {"id": "twice", "input": "f", "output": ["second"]},
    {"id": "numbers", "input": 7, "output": [True, 0.5, 2**63]},
    {"id": "surrogates", "input": "\U0001f600", "output": ["\U0001f600"]},
    {"id": "none", "input": "g", "output": [None]},
    {"input": "h"},
]


def build(folder: Path, sources: str, splits: str = "") -> Bench:
    nothing_held_out = "validation_examples_per_task: 0\ntest_examples_per_task: 0\n"
    write_files(
        folder, {"splits.yaml": nothing_held_out + splits, "bench.yaml": f"{sources}splits: splits.yaml\n"}
    )
    config = load_bench_config(folder / "bench.yaml")
    drops = Drops(config.root)
    build_bench(config.tasks(drops), drops, config.splits, folder / "bench")
    return verify_bench(folder / "bench")


def test_everything_is_kept_repaired_or_dropped_with_a_reason(tmp_path):
    task = {"Definition": ["Do it."], "Categories": ["Misc."], "Instances": INSTANCES}
    write_files(
        tmp_path,
        {
            "sni/tasks/task1_dirty.json": b"\xef\xbb\xbf" + json.dumps(task).encode(),
            "sni/tasks/task2_empty.json": "",
            "tsv/codah/codah_16_13_dev.tsv": "\ufeffa\u2028b\tc\u2029d\r\nx\ty\x00z\n\n".encode(),
        },
    )
    sources = (
        "sources:\n- {reader: super_natural_instructions, folder: sni}\n- {reader: crossfit, folder: tsv}\n"
    )
    bench = build(tmp_path, sources)
    ledger = bench.ledger()
    rows = {row["id"]: row for entry in bench.entries for row in bench.rows(entry)}
    assert len(rows["long"]["src"]) > len(LONG)
    assert rows["forty"]["references"] == FORTY
    assert rows["signs"]["src"].startswith(
        "Instructions: Do it.\nInput: c\x00\x07\x1b\u0085\ufeff\ufffd\u2028\u200b\r\nd"
    )
    assert rows["signs"]["tgt"] == "\ufffd e\rf"
    assert rows["numbers"]["references"] == ["True", "0.5", str(2**63)]
    assert rows["surrogates"]["tgt"] == "\U0001f600"
    account = ledger["tasks"]["NIV2__Misc.__task1_dirty"]
    assert (account["read"], account["written"]) == (10, {"train": 7})
    assert account["dropped"] == {"blank target": 1, "input or output is not text": 1, "no output": 1}
    assert account["repaired"] == {
        "blank or repeated reference removed": 2,
        "bool turned into text": 1,
        "float turned into text": 1,
        "int turned into text": 2,
        "row kept whose id was there before": 1,
    }
    assert rows["codah_16_13_dev-1"]["src"].split("\n")[1].startswith("a\u2028b")
    assert rows["codah_16_13_dev-1"]["tgt"] == "c\u2029d"
    assert rows["codah_16_13_dev-2"]["tgt"] == "y\x00z"
    assert ledger["skipped_files"] == {"sni/tasks/task2_empty.json": "empty file"}


@pytest.mark.parametrize(
    ("reader", "name", "content", "message"),
    [
        (
            "source_target",
            "B__C__t.jsonl",
            b'{"src": "a", "tgt": "b"}\n{"src": "\xe9"}',
            "B__C__t.jsonl:2: not UTF-8",
        ),
        ("source_target", "B__C__t.jsonl", b'\xff\xfe{\x00"\x00', "B__C__t.jsonl:1: not "),
        ("source_target", "B__C__t.jsonl", b'{"src": "a"}', "B__C__t.jsonl:1: no `tgt`"),
        (
            "crossfit",
            "codah_16_13_dev.tsv",
            "a\tb\ncaf\xe9\tc\n".encode("latin-1"),
            "codah_16_13_dev.tsv:2: not UTF-8",
        ),
        ("super_natural_instructions", "task1.json", b'{"Instances": [}', "task1.json: not valid JSON"),
    ],
)
def test_what_cannot_be_read_names_file_and_line(tmp_path, reader, name, content, message):
    write_files(tmp_path, {f"data/{name}": content})
    with pytest.raises(ValueError, match=message):
        build(tmp_path, f"sources: [{{reader: {reader}, folder: data}}]\n")
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "..", "a\x00b", "C:\\evil", "x/../../y"])
def test_no_name_leads_out_of_the_bench(tmp_path, name):
    def examples():
        drops.task(name, name).read += 1
        yield Example("1", name, name, name, "q", ("a",))

    drops = Drops()
    before = set(tmp_path.rglob("*"))
    task = Task(name, name, name, "rouge_l", examples)
    bench = build_bench([task], drops, Splits(), tmp_path / "deep" / "bench")
    (entry,) = bench.entries
    assert bench.path(entry).resolve().parent == (tmp_path / "deep" / "bench" / "train").resolve()
    created = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "deep") for path in created)
    assert entry.task == name
