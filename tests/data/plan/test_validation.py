"""Validation of a plan: sound ones pass, every single fault put into one is found and named."""

import json
from pathlib import Path
from types import EllipsisType

import numpy as np
import pytest
from corpora import lengths_document, plan_of, random_documents, write_corpus

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import ENTRY, Plan
from megatron_iml.data.plan.mixture import Mixture
from megatron_iml.data.plan.packing import PackingConfig
from megatron_iml.data.plan.validation import plan_faults

CONFIG = PackingConfig(Mixture(50), row_length=128, rows=30, seed=7, branches=3)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    # Long sources that begin alike, so that the plan has branches.
    alike = [lengths_document(40, 3, first_id=7)[:1] + [[900 + i, 2]] for i in range(12)]
    tasks = {"A__x__many": random_documents(np.random.default_rng(5), 40), "A__x__alike": alike}
    tasks["B__x__text"] = [lengths_document(0, 30, first_id=500)] * 9
    return write_corpus(tmp_path / "corpus", tasks)


@pytest.fixture
def plan(corpus: Corpus, tmp_path: Path) -> Plan:
    return plan_of(corpus, CONFIG, tmp_path / "plan")


def test_sound_ones_pass(corpus: Corpus, plan: Plan, mixed_corpus: Corpus, tmp_path: Path) -> None:
    assert (plan.entries_E["shared"] > 0).sum() > 20
    assert list(plan_faults(plan, corpus)) == []
    once = PackingConfig(Mixture(), row_length=64, rows=None, seed=1, level="fully_held_out")
    assert list(plan_faults(plan_of(mixed_corpus, once, tmp_path / "once"), mixed_corpus)) == []


def broken(plan: Plan, name: str, index: int | EllipsisType, value: object) -> Plan:
    """The plan with one element of one array replaced."""
    path = plan.folder / f"{name}.npy"
    array = np.load(path)
    array[index] = value
    np.save(path, array)
    return Plan.open(plan.folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("document", 999, "document 999, the corpus has 61"),
        ("reference", 9, "has no reference 9"),
        ("cut", 1, "after a cut of 1, expected"),
        ("length", 1, "has length 1 after a cut of 0"),
        ("shared", 300, "shares 300 tokens with entry"),
        ("trunk", -1, "tokens with entry -1"),
    ],
)
def test_faults_of_entries(corpus: Corpus, plan: Plan, field: str, value: int, message: str) -> None:
    branch = int(np.flatnonzero(plan.entries_E["shared"])[0])
    entry = plan.entries_E[branch].copy()
    entry[field] = value
    digest, fault, *_ = plan_faults(broken(plan, "entries", branch, entry), corpus)
    assert "entries.npy: SHA-256 is" in digest
    assert message in fault


def test_a_branch_that_differs_from_its_trunk(corpus: Corpus, plan: Plan) -> None:
    # The text of 30 tokens begins otherwise than the sources of 40.
    trunk = int(np.flatnonzero(plan.entries_E["shared"])[0]) - 1
    entry = np.array((52, 0, 0, 30, 0, -1), dtype=ENTRY)
    entry["shared"], branch = 0, plan.entries_E[trunk + 1].copy()
    branch["shared"] = 20
    broken(plan, "entries", trunk + 1, branch)
    faults = list(plan_faults(broken(plan, "entries", trunk, entry), corpus))
    assert any("differs from its trunk where they share" in fault for fault in faults)


@pytest.mark.parametrize("name", ["row_slots", "row_targets", "row_pairs"])
def test_faults_of_sums(corpus: Corpus, plan: Plan, name: str) -> None:
    digest, fault = plan_faults(broken(plan, name, 4, 3), corpus)
    assert f"{name}.npy" in digest
    assert fault.startswith("row 4: ")
    assert fault.endswith("the plan says 3")


def test_faults_of_the_ledger(corpus: Corpus, plan: Plan) -> None:
    path = plan.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    line = manifest["ledger"]["A__x__alike"]
    line["packed"] += 1
    line["documents"] = 10**6
    del manifest["ledger"]["B__x__text"]
    path.write_text(json.dumps(manifest))
    faults = list(plan_faults(Plan.open(plan.folder), corpus))
    packed = line["packed"]
    assert f"A__x__alike: {packed - 1} packed, the ledger says {packed}" in faults
    assert any(fault.startswith("A__x__alike: the ledger does not close") for fault in faults)
    assert any("draws allow 1" in fault for fault in faults)
    assert any("but the ledger has no such task" in fault for fault in faults)


def test_a_document_that_comes_more_often_than_16_bits_hold(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "two", {"A__x__y": [lengths_document(0, 2)] * 2})
    plan = plan_of(corpus, PackingConfig(Mixture(), row_length=8192, rows=17, seed=1), tmp_path / "often")
    assert list(plan_faults(plan, corpus)) == []
    entries = plan.entries_E.copy()
    entries["document"] = 0
    _, fault = plan_faults(broken(plan, "entries", ..., entries), corpus)
    drawn = plan.ledger["A__x__y"]["drawn"]
    assert drawn > 1 << 16
    assert fault == f"A__x__y: a document comes {drawn} times, {drawn} draws allow {drawn // 2}"
