"""Plans on disk: what is written is read back; what does not match is refused with both sides named."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from corpora import lengths_document, plan_of, write_corpus

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import ENTRY, Plan
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.packing import PackingConfig
from megatron_iml.data.plan.writer import PackedRows, PlanWriter
from megatron_iml.data.rows.loader import Loader

CONFIG = PackingConfig(mixture=Mixture(), row_length=32, rows=12, seed=1)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    documents = [lengths_document(s, 3, 4, first_id=20 * s) for s in range(1, 50)] + [lengths_document(0, 9)]
    return write_corpus(tmp_path / "corpus", {"A__b__c": documents})


def test_round_trip(corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(corpus, CONFIG, tmp_path / "plan")
    assert (plan.num_rows, plan.row_length, plan.max_positions) == (12, 32, 2048)
    assert plan.corpus_fingerprint == corpus.fingerprint
    assert plan.ledger["A__b__c"]["packed"] == len(plan.entries_E)
    assert np.concatenate([plan.entries(row) for row in range(12)]).tobytes() == plan.entries_E.tobytes()
    assert plan.entries_E.dtype == ENTRY
    assert ENTRY.itemsize == 16
    with pytest.raises(AssertionError, match="row 12 of 12"):
        plan.entries(12)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    plan_of(corpus, CONFIG, tmp_path / "one")
    plan_of(corpus, CONFIG, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert sorted(digests(tmp_path / "one")) == [
        "entries.npy",
        "manifest.json",
        "row_pairs.npy",
        "row_slots.npy",
        "row_starts.npy",
        "row_targets.npy",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"row_length": 64},
        {"rows": 13},
        {"rows": None},
        {"max_positions": 16},
        {"mixture": Mixture(9)},
        {"window": 20},
        {"branches": 2},
    ],
)
def test_fingerprint_covers_every_input(corpus: Corpus, tmp_path: Path, change: dict) -> None:
    plan = plan_of(corpus, CONFIG, tmp_path / "plan")
    config = replace(CONFIG, **change)
    other = plan_of(corpus, config, tmp_path / "other")
    assert other.fingerprint != plan.fingerprint
    with pytest.raises(ValueError) as error:
        plan_of(corpus, config, tmp_path / "plan")
    assert plan.fingerprint in str(error.value)
    assert other.fingerprint in str(error.value)
    assert Plan.open(tmp_path / "plan").fingerprint == plan.fingerprint


def test_plan_of_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(corpus, CONFIG, tmp_path / "plan")
    other = write_corpus(tmp_path / "other", {"A__b__c": [lengths_document(3, 3)] * 50})
    with pytest.raises(ValueError) as error:
        Loader(other, plan)
    message = str(error.value)
    assert corpus.fingerprint in message
    assert other.fingerprint in message
    assert "build_plan.py" in message


def test_loader_rows_are_the_documents(corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(corpus, CONFIG, tmp_path / "plan")
    loader = Loader(corpus, plan)
    cuts = 0
    for number in range(plan.num_rows):
        row, layout = loader.row(number), loader.layout(number)
        assert row.layout.index == layout.index == number
        assert row.layout.num_targets == layout.num_targets == len(row.target_ids_M) == plan.targets_R[number]
        assert row.layout.num_real == layout.num_real
        assert layout.positions_T.tolist() == row.layout.positions_T.tolist()
        assert layout.end_T.tolist() == row.layout.end_T.tolist()
        assert (layout.end_T - np.arange(plan.row_length)).sum() == plan.pairs_R[number]
        start = target = 0
        for entry in plan.entries(number):
            tokens, source_length = corpus.tokens(int(entry["document"]), int(entry["reference"]))
            kept = tokens[entry["cut"] :].tolist()
            first = max(source_length - int(entry["cut"]), 1)
            stop = start + len(kept) - 1
            assert row.tokens_T[start:stop].tolist() == kept[:-1]
            assert row.layout.positions_T[start:stop].tolist() == list(range(len(kept) - 1))
            count = len(kept) - first
            assert row.target_ids_M[target : target + count].tolist() == kept[first:]
            assert row.target_rows_M[target : target + count].tolist() == list(range(start + first - 1, stop))
            start, target, cuts = stop, target + count, cuts + int(entry["cut"] > 0)
    assert cuts > 0


def test_loader_reads_branches(corpus: Corpus, tmp_path: Path) -> None:
    # Two references of document 4 (source 5): the second stores only its target, after the shared source.
    entries = np.array([(4, 0, 0, 8, 0, -1), (4, 0, 1, 9, 5, 0)], dtype=ENTRY)
    sums = (np.array([value]) for value in (2, 10, 7, 49))
    writer = PlanWriter(tmp_path / "plan", replace(CONFIG, rows=1).origin(corpus))
    writer.append(PackedRows(entries, *sums))
    writer.close({})
    loader = Loader(corpus, Plan.open(tmp_path / "plan"))
    row = loader.row(0)
    first, second = (corpus.tokens(4, reference)[0].tolist() for reference in (0, 1))
    assert row.tokens_T[:10].tolist() == first[:7] + second[5:8]
    assert row.layout.positions_T[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert row.layout.end_T[:10].tolist() == [10] * 5 + [7] * 2 + [10] * 3
    assert row.target_rows_M.tolist() == [4, 5, 6, 4, 7, 8, 9]
    assert row.target_ids_M.tolist() == first[5:] + second[5:]
    assert loader.layout(0).end_T.tolist() == row.layout.end_T.tolist()


def test_damaged_folders(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no plan in .*manifest.json is missing; .*build_plan.py"):
        Plan.open(tmp_path / "nothing")
    folder = plan_of(corpus, CONFIG, tmp_path / "plan").folder
    entries = folder / "entries.npy"
    intact = entries.read_bytes()
    entries.write_bytes(intact[:-16])
    with pytest.raises(
        ValueError, match=rf"entries.npy has {len(intact) - 16} bytes, expected {len(intact)}"
    ):
        Plan.open(folder)
    entries.unlink()
    with pytest.raises(FileNotFoundError, match="entries.npy is missing"):
        Plan.open(folder)
    entries.write_bytes(intact)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ValueError, match="was changed after it was written"):
        Plan.open(folder)
    manifest.write_text(text.replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(ValueError, match="format version 1, allowed: 2"):
        Plan.open(folder)


def test_foreign_folder_is_not_overwritten(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    precious = tmp_path / "plan" / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(ValueError, match="exists and holds no plan"):
        plan_of(corpus, CONFIG, tmp_path / "plan")
    assert precious.read_text() == "years of work"
