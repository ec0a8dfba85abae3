"""Plans: the ledger closes, documents come in turn, rows hold whole documents, the seed says everything."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import lengths_document, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.corpus import Corpus
from megatron_iml.data.draws import Lengths
from megatron_iml.data.mixture import Mixture, Proportion
from megatron_iml.data.packing import PackingConfig, best_fit, build_plan, explain_plan, pack_stream
from megatron_iml.data.plan import PlanArrays

LENGTHS = Path(__file__).parents[2].parent / "shared" / "lengths" / "doc_lengths_mixture.npz"
CONFIG = PackingConfig(mixture=Mixture(50), row_length=64, rows=40, seed=7)


def check_rows(corpus: Corpus, config: PackingConfig, arrays: PlanArrays) -> None:
    """Every row's entries fit it, agree with the corpus, and give its sums."""
    entries, starts = arrays.entries, arrays.row_starts
    assert (entries["trunk"] == -1).all()
    assert (entries["shared"] == 0).all()
    for row, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        assert stop > start
        slots = targets = pairs = 0
        for entry in entries[start:stop]:
            document, reference = int(entry["document"]), int(entry["reference"])
            tokens, source_length = corpus.tokens(document, reference)
            assert entry["length"] == len(tokens) - entry["cut"] <= config.limit
            if entry["cut"]:
                assert entry["length"] == config.limit
                assert source_length - entry["cut"] >= 1
            own = int(entry["length"]) - 1
            slots += own
            targets += len(tokens) - max(source_length, 1)
            pairs += own * (own + 1) // 2
        assert slots <= config.row_length
        assert targets == arrays.row_targets[row]
        assert pairs == arrays.row_pairs[row]


def check_ledger(corpus: Corpus, arrays: PlanArrays, ledger: dict) -> None:
    """In = packed (truncated among them) + dropped, per task, and the entries say the same."""
    for task in corpus.task_records:
        if task.name not in ledger:
            continue
        line = ledger[task.name]
        here = np.isin(arrays.entries["document"], list(task.documents))
        assert line["documents"] == len(task.documents)
        assert line["drawn"] == line["packed"] + sum(line["dropped"].values())
        assert line["packed"] == here.sum()
        assert line["truncated"] == (arrays.entries["cut"][here] > 0).sum()
        assert line["tokens"] == arrays.entries["length"][here].sum()
    assert sum(line["target_tokens"] for line in ledger.values()) == arrays.row_targets.sum()


@pytest.mark.parametrize("rows", [1, 2, 40, 300, None])
def test_plan_is_consistent(mixed_corpus: Corpus, rows: int | None) -> None:
    config = replace(CONFIG, rows=rows)
    arrays, ledger = build_plan(mixed_corpus, config)
    assert rows is None or len(arrays.row_targets) == rows
    check_rows(mixed_corpus, config, arrays)
    check_ledger(mixed_corpus, arrays, ledger)


def usable_documents(corpus: Corpus, limit: int) -> set[int]:
    """Documents of which no reference is ever dropped."""
    return {
        document
        for document in range(corpus.num_documents)
        if all(
            1 + (corpus.source_lengths_D[document] == 0)
            <= corpus.reference_length(document, reference)
            <= limit - (corpus.source_lengths_D[document] > 0)
            for reference in range(corpus.num_references(document))
        )
    }


def test_nothing_twice_before_everything_once(mixed_corpus: Corpus) -> None:
    arrays, ledger = build_plan(mixed_corpus, replace(CONFIG, rows=400))
    usable = usable_documents(mixed_corpus, CONFIG.limit)
    for task in mixed_corpus.task_records:
        counts = Counter(d for d in arrays.entries["document"].tolist() if d in task.documents)
        times = [counts[document] for document in task.documents if document in usable]
        assert max(times) - min(times) <= 1, task.name
        epochs = ledger[task.name]["drawn"] / len(task.documents)
        assert int(epochs) <= min(times)
        assert max(times) <= int(epochs) + 1
    assert max(counts.values()) > 2  # the case is not trivial


def test_once_takes_every_document_once(mixed_corpus: Corpus) -> None:
    arrays, ledger = build_plan(mixed_corpus, replace(CONFIG, rows=None))
    documents = arrays.entries["document"].tolist()
    assert len(documents) == len(set(documents))
    assert usable_documents(mixed_corpus, CONFIG.limit) <= set(documents)
    assert [line["drawn"] for line in ledger.values()] == [
        len(task.documents) for task in mixed_corpus.task_records
    ]
    # Each task begins with an empty text, a text of 66 and a target of 65 tokens: no row of 64 holds them.
    assert all(line["dropped"]["no_target"] == 1 for line in ledger.values())
    assert all(line["dropped"]["target_too_long"] == 2 for line in ledger.values())


def test_once_of_one_level(mixed_corpus: Corpus) -> None:
    arrays, ledger = build_plan(mixed_corpus, replace(CONFIG, rows=None, level="fully_held_out"))
    assert list(ledger) == ["B1__c__t3"]
    assert set(arrays.entries["document"].tolist()) <= set(mixed_corpus.tasks["B1__c__t3"])
    with pytest.raises(
        ValueError, match="no task of level 'held_out'; it has fully_held_out, fully_supervised"
    ):
        build_plan(mixed_corpus, replace(CONFIG, level="held_out"))


def same(a: PlanArrays, b: PlanArrays) -> bool:
    return all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes()
        for name in ("entries", "row_starts", "row_targets", "row_pairs")
    )


def test_the_seed_says_everything(mixed_corpus: Corpus) -> None:
    first, _ = build_plan(mixed_corpus, CONFIG)
    again, _ = build_plan(mixed_corpus, CONFIG)
    other, _ = build_plan(mixed_corpus, replace(CONFIG, seed=8))
    assert same(first, again)
    assert not same(first, other)


def test_known_plan(tmp_path: Path) -> None:
    # A change here is a change of algorithm: raise ALGORITHM_VERSION, so that old plans are told apart.
    corpus = write_corpus(tmp_path / "c", {"A__b__c": [lengths_document(s, 2) for s in (1, 2, 3, 4, 5, 6)]})
    arrays, _ = build_plan(corpus, PackingConfig(Mixture(), row_length=8, rows=4, seed=1))
    rows = np.split(arrays.entries["document"], arrays.row_starts[1:-1])
    assert [row.tolist() for row in rows] == [[5], [1, 3], [4, 0], [2]]


def test_positions_limit_documents_in_long_rows(mixed_corpus: Corpus) -> None:
    assert PackingConfig(Mixture(), row_length=16384, rows=1, seed=1).limit == 2049
    config = replace(CONFIG, row_length=512, max_positions=32, rows=10)
    arrays, _ = build_plan(mixed_corpus, config)
    assert arrays.entries["length"].max() == 33
    check_rows(mixed_corpus, config, arrays)


def test_mixture_is_followed(tmp_path: Path) -> None:
    tasks = {
        "A__x__long": [lengths_document(40, 10)] * 200,
        "A__x__tiny": [lengths_document(4, 3)] * 20,
        "R__x__text": [lengths_document(0, 60)] * 30,
    }
    corpus = write_corpus(tmp_path / "c", tasks)
    mixture = Mixture(100, {"A": Proportion(0.9, "examples"), "R": Proportion(0.1, "tokens")})
    config = PackingConfig(mixture, row_length=2048, rows=20, seed=1)
    _, ledger = build_plan(corpus, config)
    tokens = sum(line["tokens"] for line in ledger.values())
    assert ledger["R__x__text"]["tokens"] / tokens == pytest.approx(0.1, abs=0.005)
    assert ledger["A__x__long"]["drawn"] / ledger["A__x__tiny"]["drawn"] == pytest.approx(5, rel=0.05)
    for task in explain_plan(corpus, config):
        assert task.share * sum(line["drawn"] for line in ledger.values()) == pytest.approx(
            ledger[task.name]["drawn"], abs=2
        )
        assert task.tokens == pytest.approx(ledger[task.name]["tokens"], rel=0.06)
    with pytest.raises(ValueError, match="give a number of rows to explain"):
        explain_plan(corpus, replace(config, rows=None))


def test_impossible_plans(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", {"A__x__y": [lengths_document(4, 30)]})
    for rows in (3, None):
        with pytest.raises(ValueError, match="fits 9 tokens; raise row_length"):
            build_plan(corpus, PackingConfig(Mixture(), row_length=8, rows=rows, seed=1))
    with pytest.raises(ValueError, match="have 65536 tokens; a plan holds at most 65535"):
        PackingConfig(Mixture(), row_length=65535, rows=3, seed=1, max_positions=1 << 17)
    with pytest.raises(ValueError, match="rows 0, row_length 8.*at least 1"):
        build_plan(corpus, PackingConfig(Mixture(), row_length=8, rows=0, seed=1))


@settings(max_examples=100, deadline=None)
@given(slots=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_against_the_definition(slots: list[int]) -> None:
    row_of, rows = best_fit(np.array(slots), 20)
    free: list[int] = []
    for document in sorted(range(len(slots)), key=lambda i: -slots[i]):
        fitting = [space for space in free if space >= slots[document]]
        if fitting:
            free[free.index(min(fitting))] -= slots[document]
        else:
            free.append(20 - slots[document])
    assert rows == len(free)
    used = np.bincount(row_of, weights=slots, minlength=rows)
    assert sorted(20 - used) == sorted(free)


@settings(max_examples=60, deadline=None)
@given(slots=st.lists(st.integers(1, 8), min_size=40, max_size=80), rows=st.integers(1, 9))
def test_exact_number_of_rows(slots: list[int], rows: int) -> None:
    # 40 documents or more of 8 slots at most need 5 rows of 8 or more; 9 need 65 slots or more.
    if sum(slots) < 8 * rows:
        slots = slots + [8] * rows
    taken = pack_stream(np.array(slots), replace(CONFIG, row_length=8, rows=rows))
    used = np.bincount(taken, weights=slots[: len(taken)], minlength=rows)
    assert len(used) == rows
    assert used.min() > 0
    assert used.max() <= 8


@pytest.mark.skipif(not LENGTHS.is_file(), reason=f"real document lengths are not at {LENGTHS}")
@pytest.mark.parametrize(("row_length", "rows"), [(2048, None), (2048, 8000), (8192, 2000)])
def test_fill_on_real_lengths(row_length: int, rows: int | None) -> None:
    stored = np.load(LENGTHS)
    lengths = Lengths(
        stored["prompt_len"].astype(np.int64), stored["target_len"].astype(np.int64), limit=2049
    )
    slots = (lengths.length_N - 1)[lengths.kept_N]
    row = pack_stream(slots, replace(CONFIG, row_length=row_length, rows=rows))
    num_rows = int(row.max()) + 1
    assert rows in (None, num_rows)
    assert slots[: len(row)].sum() / num_rows / row_length >= 0.995
