"""Plans of whole runs: the ledger closes, documents come in turn, rows hold whole documents."""

import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpora import lengths_document, plan_of, write_corpus, write_lengths

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.build import build_plan, foresee_plan
from megatron_iml.data.plan.folder import Plan
from megatron_iml.data.plan.mixture import Mixture, Proportion
from megatron_iml.data.plan.packing import PackingConfig
from megatron_iml.data.plan.shares import explain_tasks

CONFIG = PackingConfig(mixture=Mixture(50), row_length=64, rows=40, seed=7, window=12)


def check_rows(corpus: Corpus, config: PackingConfig, plan: Plan) -> None:
    """Every row's entries fit it, agree with the corpus, and give its sums."""
    assert (plan.entries_E["trunk"] == -1).all()
    assert (plan.entries_E["shared"] == 0).all()
    for row in range(plan.num_rows):
        slots = targets = pairs = 0
        for entry in plan.entries(row):
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
        assert 0 < slots <= config.row_length
        assert slots == plan.slots_R[row]
        assert targets == plan.targets_R[row]
        assert pairs == plan.pairs_R[row]


def check_ledger(corpus: Corpus, plan: Plan) -> None:
    """In = packed (truncated among them) + dropped, per task, and the entries say the same."""
    for task in corpus.task_records:
        if task.name not in plan.ledger:
            continue
        line, entries = plan.ledger[task.name], plan.entries_E
        here = np.isin(entries["document"], list(task.documents))
        assert line["documents"] == len(task.documents)
        assert line["drawn"] == line["packed"] + sum(line["dropped"].values())
        assert line["packed"] == here.sum()
        assert line["truncated"] == (entries["cut"][here] > 0).sum()
        assert line["tokens"] == entries["length"][here].sum()
    assert sum(line["target_tokens"] for line in plan.ledger.values()) == plan.targets_R.sum()


@pytest.mark.parametrize("rows", [1, 2, 40, 300, None])
def test_plan_is_consistent(mixed_corpus: Corpus, rows: int | None, tmp_path: Path) -> None:
    config = replace(CONFIG, rows=rows)
    plan = plan_of(mixed_corpus, config, tmp_path / "plan")
    assert rows in (None, plan.num_rows)
    check_rows(mixed_corpus, config, plan)
    check_ledger(mixed_corpus, plan)


def usable_documents(corpus: Corpus, limit: int) -> set[int]:
    """Documents of which no reference is ever dropped."""
    return {
        document
        for document in range(corpus.num_documents)
        if all(
            1 + (source == 0) <= len(tokens) - source <= limit - (source > 0)
            for tokens, source in (
                corpus.tokens(document, reference) for reference in range(corpus.num_references(document))
            )
        )
    }


def test_nothing_twice_before_everything_once(mixed_corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(mixed_corpus, replace(CONFIG, rows=400), tmp_path / "plan")
    usable = usable_documents(mixed_corpus, CONFIG.limit)
    for task in mixed_corpus.task_records:
        counts = Counter(d for d in plan.entries_E["document"].tolist() if d in task.documents)
        times = [counts[document] for document in task.documents if document in usable]
        assert max(times) - min(times) <= 1, task.name
        epochs = plan.ledger[task.name]["drawn"] / len(task.documents)
        assert int(epochs) <= min(times)
        assert max(times) <= int(epochs) + 1
    assert max(counts.values()) > 2  # the case is not trivial


def test_once_takes_every_document_once(mixed_corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(mixed_corpus, replace(CONFIG, rows=None), tmp_path / "plan")
    documents, ledger = plan.entries_E["document"].tolist(), plan.ledger
    assert len(documents) == len(set(documents))
    assert usable_documents(mixed_corpus, CONFIG.limit) <= set(documents)
    assert [line["drawn"] for line in ledger.values()] == [
        len(task.documents) for task in mixed_corpus.task_records
    ]
    # Each task begins with an empty text, a text of 66 and a target of 65 tokens: no row of 64 holds them.
    assert all(line["dropped"]["no_target"] == 1 for line in ledger.values())
    assert all(line["dropped"]["target_too_long"] == 2 for line in ledger.values())


def test_once_of_one_level(mixed_corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(mixed_corpus, replace(CONFIG, rows=None, level="fully_held_out"), tmp_path / "plan")
    assert list(plan.ledger) == ["B1__c__t3"]
    assert set(plan.entries_E["document"].tolist()) <= set(mixed_corpus.tasks["B1__c__t3"])
    with pytest.raises(
        ValueError, match="no task of level 'held_out'; it has fully_held_out, fully_supervised"
    ):
        plan_of(mixed_corpus, replace(CONFIG, level="held_out"), tmp_path / "other")


def test_known_plan(tmp_path: Path) -> None:
    # A change here is a change of algorithm: raise ALGORITHM_VERSION, so that old plans are told apart.
    corpus = write_corpus(tmp_path / "c", {"A__b__c": [lengths_document(s, 2) for s in (1, 2, 3, 4, 5, 6)]})
    plan = plan_of(corpus, PackingConfig(Mixture(), row_length=8, rows=4, seed=1), tmp_path / "plan")
    rows = [plan.entries(row)["document"].tolist() for row in range(4)]
    assert rows == [[1, 3], [4], [2, 0], [5]]


def test_positions_limit_documents_in_long_rows(mixed_corpus: Corpus, tmp_path: Path) -> None:
    assert PackingConfig(Mixture(), row_length=16384, rows=1, seed=1).limit == 2049
    config = replace(CONFIG, row_length=512, max_positions=32, rows=10)
    plan = plan_of(mixed_corpus, config, tmp_path / "plan")
    assert plan.entries_E["length"].max() == 33
    check_rows(mixed_corpus, config, plan)


def test_mixture_is_followed(tmp_path: Path) -> None:
    tasks = {
        "A__x__long": [lengths_document(40, 10)] * 200,
        "A__x__tiny": [lengths_document(4, 3)] * 20,
        "R__x__text": [lengths_document(0, 60)] * 30,
    }
    corpus = write_corpus(tmp_path / "c", tasks)
    mixture = Mixture(100, {"A": Proportion(0.9, "examples"), "R": Proportion(0.1, "tokens")})
    config = PackingConfig(mixture, row_length=2048, rows=20, seed=1)
    ledger = plan_of(corpus, config, tmp_path / "plan").ledger
    tokens = sum(line["tokens"] for line in ledger.values())
    assert ledger["R__x__text"]["tokens"] / tokens == pytest.approx(0.1, abs=0.005)
    assert ledger["A__x__long"]["drawn"] / ledger["A__x__tiny"]["drawn"] == pytest.approx(5, rel=0.05)
    outlook = foresee_plan(corpus, config)
    for task in explain_tasks(mixture, outlook.blend, outlook.sizes):
        assert task.draws == pytest.approx(ledger[task.name]["drawn"], rel=0.02, abs=2)
        assert task.tokens == pytest.approx(ledger[task.name]["tokens"], rel=0.06)
    with pytest.raises(ValueError, match="give a number of rows to explain"):
        foresee_plan(corpus, replace(config, rows=None))


def test_shared_prefixes_make_room_for_more_draws(tmp_path: Path) -> None:
    # 41 tokens of which 40 are the same: four of them take 40 + 3 x 1 slots instead of 4 x 41.
    alike = [lengths_document(40, 3, first_id=7)[:1] + [[900 + i, 2]] for i in range(64)]
    corpus = write_corpus(tmp_path / "c", {"A__x__y": alike})
    config = PackingConfig(Mixture(), row_length=128, rows=30, seed=1, window=64)
    apart = foresee_plan(corpus, config).blend.draws
    assert foresee_plan(corpus, replace(config, branches=3)).blend.draws > 2 * apart


def test_impossible_plans(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", {"A__x__y": [lengths_document(4, 30)]})
    for rows, message in ((3, "no document of the mixture fits a row"), (None, "no document fits 9 tokens")):
        config = PackingConfig(Mixture(), row_length=8, rows=rows, seed=1)
        with pytest.raises(ValueError, match=f"{message}.*; raise row_length"):
            plan_of(corpus, config, tmp_path / "plan")
        assert not (tmp_path / "plan").exists()


def test_epoch_bounds_hold_to_the_document(tmp_path: Path) -> None:
    tasks = {"A__x__few": [lengths_document(7, 4)] * 10, "A__x__many": [lengths_document(7, 4)] * 200}
    corpus = write_corpus(tmp_path / "c", tasks)
    config = PackingConfig(Mixture(10, max_epochs=2), row_length=100, rows=20, seed=1)
    plan = plan_of(corpus, config, tmp_path / "plan")
    # 200 documents fill 20 rows; under the cap each task would have half of them.
    assert plan.ledger["A__x__few"]["drawn"] == 20
    assert plan.ledger["A__x__many"]["drawn"] == 180
    with pytest.raises(
        ValueError, match=r"cannot be followed: the rows have 5,000 slots.*documents for 4,200"
    ):
        plan_of(corpus, replace(config, rows=50), tmp_path / "more")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_seed_and_window_decide_and_workers_do_not(mixed_corpus: Corpus, tmp_path: Path) -> None:
    first = plan_of(mixed_corpus, CONFIG, tmp_path / "first")
    again = plan_of(mixed_corpus, CONFIG, tmp_path / "again", workers=2)
    assert digests(first.folder) == digests(again.folder)
    for change in ({"seed": 8}, {"window": 30}):
        other = plan_of(mixed_corpus, replace(CONFIG, **change), tmp_path / f"{change}")
        assert other.entries_E.tobytes() != first.entries_E.tobytes()


def test_a_finished_plan_is_kept_and_a_damaged_one_is_not_called_finished(
    mixed_corpus: Corpus, tmp_path: Path
) -> None:
    heard: list[int] = []

    def build() -> dict:
        return build_plan(mixed_corpus, CONFIG, tmp_path / "plan", lambda done, total: heard.append(done))

    manifest = build()
    windows = len(heard)
    assert windows > 3
    assert build() == manifest
    assert len(heard) == windows
    (tmp_path / "plan" / "entries.npy").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"entries.npy has 3 bytes, .*remove .*plan and build it anew"):
        build()


def test_a_killed_build_leaves_nothing_and_the_next_one_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths = (rng.integers(1, 60, 100_000), rng.integers(2, 9, 100_000))
    corpus = write_lengths(tmp_path / "corpus", {"A__b__c": lengths})
    command = [sys.executable, Path(__file__).parents[3] / "tools/preprocess/build_plan.py"]
    command += ["--input", corpus.folder, "--once", "--row-length", "256", "--window", "500"]
    command += ["--output", tmp_path / "plan", "--workers", "2"]
    partial = tmp_path / ".plan.partial" / "entries.npy"
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not (partial.is_file() and partial.stat().st_size > 50_000):
            assert process.poll() is None, "the build ended before it could be killed"
            assert time.monotonic() < deadline, "the build has written nothing"
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    # Nobody told them to end, and they would hold their memory for good.
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert not (tmp_path / "plan").exists()
    subprocess.run(command, check=True)
    assert not partial.exists()
    config = PackingConfig(Mixture(), row_length=256, rows=None, seed=1, window=500)
    undisturbed = plan_of(corpus, config, tmp_path / "undisturbed")
    assert digests(tmp_path / "plan") == digests(undisturbed.folder)
