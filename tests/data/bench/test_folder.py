from pathlib import Path

import orjson
import pytest

from megatron_iml.data.bench.folder import Bench, file_stem, verify_bench
from megatron_iml.data.bench.splits import Splits
from megatron_iml.data.bench.writer import build_bench
from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops


@pytest.fixture
def bench(tmp_path) -> Bench:
    drops = Drops()

    def examples():
        for index in range(20):
            drops.task("B", "t").read += 1
            yield Example(str(index), "t", "B", "C", f"question {index}", ("yes", "no"), ("yes", "no"))

    return build_bench([Task("t", "B", "C", "accuracy", examples)], drops, Splits(), tmp_path / "bench")


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    manifest["files"][0].update(changes)
    path.write_bytes(orjson.dumps(manifest))


def test_files_are_chosen_by_split_and_level(bench):
    assert [(entry.split, entry.examples) for entry in bench.files()] == [
        ("train", 16),
        ("validation", 2),
        ("test", 2),
    ]
    assert [entry.file for entry in bench.files("test", "fully_supervised")] == ["test/B__C__t.jsonl"]
    assert bench.files(level="fully_held_out") == []
    with pytest.raises(
        ValueError, match="no split or level 'valid' in a bench; choose from train, validation, test"
    ):
        bench.files("valid")


def test_rows_hold_references_and_candidates(bench):
    row = next(bench.rows(bench.files("train")[0]))
    assert row["src"].startswith("question ")
    assert (row["tgt"], row["references"], row["candidates"]) == ("yes", ["yes", "no"], ["yes", "no"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "1", "src": "a"}', "no `tgt`; a bench row needs the texts id, src and tgt"),
        (b'{"id": "1", "tgt": "a"}', "no `src`; a bench row needs the texts id, src and tgt"),
        (b'{"id": "1", "src": "a", "tgt": 3}', "`tgt` is 3; a bench row needs the texts"),
        (
            b'{"id": "1", "src": "a", "tgt": "b", "references": "b"}',
            "`references` is 'b'; it must be a list of texts",
        ),
        (
            b'{"id": "1", "src": "a", "tgt": "b", "candidates": [1]}',
            r"`candidates` is \[1\]; it must be a list of texts",
        ),
        (b'{"id": "1", "src": "\xff"}', "not UTF-8"),
        (b'{"id": ', "not valid JSON"),
    ],
)
def test_malformed_rows_name_file_and_line(bench, line, message):
    entry = bench.files("test")[0]
    path = bench.path(entry)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=f"B__C__t.jsonl:3: {message}"):
        list(bench.rows(entry))


def test_a_sound_bench_verifies(bench):
    assert verify_bench(bench.folder) == bench


def test_verification_finds_a_changed_byte_and_a_lost_row(bench):
    path = bench.path(bench.files("test")[0])
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"question", b"Question", 1))
    with pytest.raises(ValueError, match="test/B__C__t.jsonl: SHA-256 .*, expected .*; build the bench anew"):
        verify_bench(bench.folder)
    path.write_bytes(sound.splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="test/B__C__t.jsonl: rows 1, expected 2; build the bench anew"):
        verify_bench(bench.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is in the manifest but not on disk"):
        verify_bench(bench.folder)


def test_verification_finds_an_extra_file_and_an_open_ledger(bench):
    extra = bench.folder / "train" / "B__C__other.jsonl"
    extra.write_bytes(b"")
    with pytest.raises(ValueError, match="1 files are not in the manifest, e.g. train/B__C__other.jsonl"):
        verify_bench(bench.folder)
    extra.unlink()
    ledger = bench.ledger()
    ledger["tasks"]["B__C__t"]["read"] += 1
    (bench.folder / "ledger.json").write_bytes(orjson.dumps(ledger))
    with pytest.raises(ValueError, match="B__C__t read 21 but accounts for 20"):
        verify_bench(bench.folder)


def test_manifests_of_another_kind_are_refused(bench):
    with pytest.raises(FileNotFoundError, match="no bench in .*: manifest.json is missing"):
        Bench.open(bench.folder / "train")
    edit_manifest(bench.folder, level="fully_held_out")
    with pytest.raises(ValueError, match="file 0 trains on the fully_held_out task 't'"):
        Bench.open(bench.folder)
    edit_manifest(bench.folder, split="valid")
    with pytest.raises(ValueError, match="file 0 has split 'valid'; choose from train, validation, test"):
        Bench.open(bench.folder)


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (("NIV2", "Cause Effect Classification", "task828"), "NIV2__Cause_Effect_Classification__task828"),
        (("B", "a__b/c_", "subjqa__electronics"), "B__a_b_c__subjqa__electronics"),
        (("..", "../../etc", "../passwd"), "..__.._.._etc__.._passwd"),
        (("B", "C", "/root\x00\n*"), "B__C___root_"),
        (("B", "Misc.", "Übung"), "B__Misc.__Übung"),
    ],
)
def test_names_stay_inside_the_folder_and_come_apart_again(names, stem):
    assert file_stem(*names) == stem
    assert Path(stem + ".jsonl").name == stem + ".jsonl"
    benchmark, category, _ = stem.split("__", 2)
    assert file_stem(benchmark, category, "t") == f"{benchmark}__{category}__t"


def test_names_that_cannot_be_files():
    with pytest.raises(ValueError, match="category '__', task 't': one is blank"):
        file_stem("B", "__", "t")
    with pytest.raises(ValueError, match="is too long for a file"):
        file_stem("B", "C", "t" * 300)
