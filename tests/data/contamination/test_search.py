"""Planted overlaps are found, shown and removed; instructions in common are not."""

import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import orjson
import pytest
import yaml
from corpora import ROWS, write_bench

from megatron_iml.data.bench.folder import Bench, BenchFile, manifest_bytes, verify_bench
from megatron_iml.data.contamination.removal import load_decisions, remove_contamination
from megatron_iml.data.contamination.report import pairs_over, write_report
from megatron_iml.data.contamination.search import Search, find_contamination, open_findings, row_texts

INSTRUCTION = (
    "Read the passage below with care and then answer the question that follows it in one word only."
)
PASSAGE = (
    "On the seventh of May the old lighthouse keeper of Skagen found a green bottle with a letter from {}"
)
QUIZ, TRIVIA, OTHER = "B__Held__quiz", "B__Trained__trivia", "B__Trained__other"


def words(task: str, index: int) -> str:
    """A first word that a row of each task has, as inputs begin alike, and twenty of this example alone."""
    return f"colour{index} " + " ".join(f"{task}{index}w{k}" for k in range(20))


def quiz_row(index: int) -> str:
    text = PASSAGE.format(f"number {index}") if 10 <= index < 14 else words("quiz", index)
    return f"{INSTRUCTION}\n{text}"


def trivia_row(index: int) -> str:
    # Rendered otherwise, as another benchmark would.
    text = PASSAGE.format(f"number {index + 10}").upper() if index < 4 else words("trivia", index)
    return f"{INSTRUCTION} {text}"


def other_row(index: int) -> str:
    return words("other", index)


def make_bench(
    folder: Path, quiz: Sequence[int] = range(100), other: Callable[[int], str] = other_row, short: int = 0
) -> Bench:
    """All rows of `trivia` hold the instruction of `quiz`, rows 0 to 3 the passages of its rows 10 to 13."""
    entries, accounts = [], {}
    files = [
        (TRIVIA, "train", "fully_supervised", trivia_row, range(100)),
        (OTHER, "train", "fully_supervised", other, range(100)),
        (QUIZ, "validation", "fully_held_out", str, range(short)),
        (QUIZ, "test", "fully_held_out", quiz_row, quiz),
    ]
    for stem, split, level, text, indices in (file for file in files if file[-1]):
        benchmark, category, task = stem.split("__")
        rows = [{"id": f"{task}-{i}", "src": text(i), "tgt": f"answer {i}"} for i in indices]
        data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{stem}.jsonl").write_bytes(data)
        digest, file = sha256(data).hexdigest(), f"{split}/{stem}.jsonl"
        entries.append(BenchFile(task, benchmark, category, level, split, len(rows), "rouge_l", digest, file))
        account = accounts.setdefault(stem, {"read": 0, "written": {}, "dropped": {}, "repaired": {}})
        account["read"] += len(rows)
        account["written"][split] = len(rows)
    (folder / "manifest.json").write_bytes(manifest_bytes(1, {}, entries))
    (folder / "ledger.json").write_bytes(orjson.dumps({"tasks": accounts, "skipped_files": {}}))
    return verify_bench(folder)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("contamination") / "bench")


def search(bench: Bench, output: Path, workers: int = 1):
    output.mkdir(exist_ok=True)
    heard: list[int] = []
    findings = find_contamination(
        Search(bench.folder, output, workers=workers), lambda total: None, heard.append
    )
    assert sum(heard) == sum(entry.examples for entry in bench.entries)
    return findings


def ids(bench: Bench, file: str) -> set[str]:
    (entry,) = [entry for entry in bench.entries if entry.file == file]
    return {row["id"] for row in bench.rows(entry)}


def test_planted_passages_are_found_apart_from_the_instruction(bench: Bench, tmp_path: Path) -> None:
    findings = search(bench, tmp_path / "found")
    found = {
        (pair.training.stem, pair.evaluation.file): (pair.shared, pair.specific) for pair in findings.pairs()
    }
    assert found[TRIVIA, f"test/{QUIZ}.jsonl"] == (100, 4), (
        "the instruction is in all rows, a passage in four"
    )
    assert not [key for key in found if key[0] == OTHER]


def test_an_instruction_in_few_evaluation_rows_is_known_by_its_training_task(tmp_path: Path) -> None:
    """Four evaluation rows cannot tell a template from a passage; a hundred training rows can."""
    findings = search(make_bench(tmp_path / "bench", quiz=range(8, 12)), tmp_path / "found")
    (pair,) = findings.pairs()
    assert (pair.evaluation.examples, pair.shared, pair.specific) == (4, 4, 2)


def test_a_search_reads_the_index_that_it_has_made(bench: Bench, tmp_path: Path) -> None:
    few = make_bench(tmp_path / "bench", quiz=range(8, 12))
    for searched, shared in ((few, 4), (bench, 100)):
        (pair,) = search(searched, tmp_path / "found").pairs()
        assert pair.shared == shared
        shutil.rmtree(tmp_path / "found")


def test_workers_and_a_killed_search_find_the_same(bench: Bench, tmp_path: Path) -> None:
    alone = search(bench, tmp_path / "alone")
    (tmp_path / "alone" / "hits" / f"{TRIVIA}.npy").unlink()
    (tmp_path / "alone" / "index" / "settled").unlink()
    again = search(bench, tmp_path / "alone")
    shared = search(bench, tmp_path / "two", workers=2)
    expected = [(pair.training.stem, pair.shared, pair.specific) for pair in alone.pairs()]
    for findings in (again, shared):
        assert [(pair.training.stem, pair.shared, pair.specific) for pair in findings.pairs()] == expected


def test_report_quotes_the_passage_and_proposes_removal(bench: Bench, tmp_path: Path) -> None:
    findings = search(bench, tmp_path / "found")
    pairs = write_report(findings, 0.01)
    assert len(pairs) == len(pairs_over(findings, 0.01)) == 1
    text = (tmp_path / "found" / "report.md").read_text()
    assert "| 100 | 100.0% | 4.0% | remove_training_examples |" in text
    assert "old lighthouse keeper of skagen found a green bottle" in text
    assert "`trivia-0` and `quiz-10`" in text
    decisions = yaml.safe_load((tmp_path / "found" / "decisions.yaml").read_text())
    assert [pair["decision"] for pair in decisions["pairs"]] == ["remove_training_examples"]
    assert write_report(findings, 0.05) and "remove" not in "".join(
        line for line in (tmp_path / "found" / "report.md").read_text().splitlines() if line.startswith("| B")
    )


@pytest.mark.parametrize(
    ("decision", "file", "gone"),
    [
        ("remove_training_examples", f"train/{TRIVIA}.jsonl", {f"trivia-{i}" for i in range(4)}),
        ("remove_evaluation_examples", f"test/{QUIZ}.jsonl", {f"quiz-{i}" for i in range(10, 14)}),
        ("keep", f"train/{TRIVIA}.jsonl", set()),
    ],
)
def test_removal_takes_the_rows_and_accounts_for_them(
    bench: Bench, tmp_path: Path, decision: str, file: str, gone: set[str]
) -> None:
    write_report(search(bench, tmp_path / "found"), 0.01)
    decisions = tmp_path / "found" / "decisions.yaml"
    decisions.write_text(
        decisions.read_text().replace("decision: remove_training_examples", f"decision: {decision}")
    )
    remove_contamination(bench.folder, tmp_path / "found", tmp_path / "clean")
    clean = verify_bench(tmp_path / "clean")
    assert ids(bench, file) - ids(clean, file) == gone
    for entry in clean.entries:
        assert entry.file == file or clean.path(entry).read_bytes() == bench.path(entry).read_bytes()
    before, after = bench.ledger()["tasks"], clean.ledger()["tasks"]
    stem = Path(file).stem
    assert sum(after[stem]["dropped"].values()) - sum(before[stem]["dropped"].values()) == len(gone)


@pytest.mark.parametrize(
    ("decision", "file"),
    [("remove_training_task", f"train/{TRIVIA}.jsonl"), ("remove_evaluation_task", f"test/{QUIZ}.jsonl")],
)
def test_a_whole_task_goes(bench: Bench, tmp_path: Path, decision: str, file: str) -> None:
    write_report(search(bench, tmp_path / "found"), 0.01)
    decisions = tmp_path / "found" / "decisions.yaml"
    decisions.write_text(
        decisions.read_text().replace("decision: remove_training_examples", f"decision: {decision}")
    )
    remove_contamination(bench.folder, tmp_path / "found", tmp_path / "clean")
    clean = verify_bench(tmp_path / "clean")
    assert {entry.file for entry in bench.entries} - {entry.file for entry in clean.entries} == {file}


def test_two_training_tasks_take_rows_of_one_evaluation_file(tmp_path: Path) -> None:
    # The test file's rows are counted after those of the validation file.
    bench = make_bench(
        tmp_path / "bench", other=lambda i: words("quiz", 20 + i) if i < 3 else other_row(i), short=5
    )
    findings = search(bench, tmp_path / "found")
    file = f"test/{QUIZ}.jsonl"
    assert findings.rows_too_short == {f"validation/{QUIZ}.jsonl": 5, file: 0}
    write_report(findings, 0.01)
    decisions = tmp_path / "found" / "decisions.yaml"
    proposed = decisions.read_text()
    assert proposed.count("decision: remove_training_examples") == 2
    decisions.write_text(proposed.replace("remove_training_examples\n", "remove_evaluation_examples\n"))
    remove_contamination(bench.folder, tmp_path / "found", tmp_path / "clean")
    gone = ids(bench, file) - ids(verify_bench(tmp_path / "clean"), file)
    assert gone == {f"quiz-{i}" for i in (10, 11, 12, 13, 20, 21, 22)}


def test_further_references_are_compared_on_their_own() -> None:
    row = {"id": "1", "src": "Who?", "tgt": "he", "references": ["he", "she or they"]}
    assert row_texts(row) == ["Who? he", "she or they"]


def test_a_bench_without_evaluation_has_nothing_to_compare(tmp_path: Path) -> None:
    alone = write_bench(tmp_path / "bench", ROWS)
    with pytest.raises(ValueError, match="has 3 training and 0 evaluation files, one of each is needed"):
        find_contamination(Search(alone, tmp_path / "found"), lambda total: None, lambda rows: None)


def test_decisions_that_do_not_fit_are_refused(bench: Bench, tmp_path: Path) -> None:
    write_report(search(bench, tmp_path / "found"), 0.01)
    path = tmp_path / "found" / "decisions.yaml"
    good = path.read_text()
    path.write_text(good.replace("decision: remove_training_examples", "decision: forget"))
    with pytest.raises(ValueError, match="pair 0 has decision 'forget'; known are keep, remove_training"):
        load_decisions(path, bench)
    path.write_text(good.replace(f'"test/{QUIZ}.jsonl"', f"[test/{QUIZ}.jsonl]"))
    with pytest.raises(
        ValueError, match=r"pair 0 has evaluation \['test.*; did you mean 'test/B__Held__quiz"
    ):
        load_decisions(path, bench)
    path.write_text(good.replace(bench.fingerprint, "0" * 64))
    with pytest.raises(ValueError, match="was made for another bench"):
        load_decisions(path, bench)
    record = tmp_path / "found" / "index.json"
    record.write_bytes(
        orjson.dumps({**orjson.loads(record.read_bytes()), "origin": {"bench_fingerprint": "x"}})
    )
    with pytest.raises(ValueError, match="was made from another bench"):
        open_findings(tmp_path / "found", bench)
    with pytest.raises(ValueError, match="holds findings of another bench or n-gram; remove it"):
        search(bench, tmp_path / "found")
