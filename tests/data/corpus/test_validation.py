"""Validation of a corpus: every single fault put into a sound one is found and named."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import lengths_document, random_documents, write_corpus

from megatron_iml.data.corpus import validation
from megatron_iml.data.corpus.folder import Corpus, canonical_digest
from megatron_iml.data.corpus.format import HEADER
from megatron_iml.data.corpus.validation import corpus_faults


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    alike = [lengths_document(40, 3, first_id=7)[:1] + [[900 + i, 2]] for i in range(12)]
    tasks = {"A__x__many": random_documents(np.random.default_rng(5), 40), "A__x__alike": alike}
    tasks["B__x__text"] = [lengths_document(0, 30, first_id=500)] * 9
    return write_corpus(tmp_path / "corpus", tasks)


def test_sound_ones_pass(corpus: Corpus, mixed_corpus: Corpus) -> None:
    assert list(corpus_faults(corpus)) == list(corpus_faults(mixed_corpus)) == []


def change_bytes(path: Path, offset: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("stretch", [1, 1 << 15])
def test_faults_of_a_corpus(corpus: Corpus, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "STRETCH", stretch)
    path = corpus.folder / "shard-00000.bin"
    intact = path.read_bytes()
    # Document 0 is the text [2] alone; the end of it is no end any more.
    change_bytes(path, 0, b"\x09\x00")
    digest, fault = corpus_faults(Corpus.open(corpus.folder))
    assert "shard-00000.bin: SHA-256 is" in digest
    assert fault == "shard-00000: document 0: a target does not end with id 2"
    path.write_bytes(intact)

    index = corpus.folder / "shard-00000.idx"
    sequences = len(corpus.shards[0].sizes_S)
    change_bytes(index, HEADER.size + 4 * sequences + 8 * 3, b"\x07")
    # Between two stretches as well as within one.
    _, fault, *_ = corpus_faults(Corpus.open(corpus.folder))
    assert "sequence 3 does not begin where the one before it ends" in fault


def test_an_empty_first_sequence(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"A__x__y": [[[], [5, 2]], lengths_document(3, 2)]})
    (fault,) = corpus_faults(corpus)
    assert fault == "shard-00000: sequence 0 does not begin where the one before it ends, or is empty"


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "task",
            "tokens",
            505,
            "A__x__alike: holds 504 tokens, 24 of them targets; the manifest says 505 and 24",
        ),
        ("tokenizer", "vocab_size", 911, "id 911 in documents 0 to 61, the vocabulary has 911"),
        ("task", "first_document", 41, "the tasks do not cover documents 0 to 61 one after another"),
    ],
)
def test_manifest_that_says_otherwise(
    corpus: Corpus, section: str, key: str, value: int, message: str
) -> None:
    path = corpus.folder / "manifest.json"
    content = json.loads(path.read_text())
    (content["tasks"][1] if section == "task" else content[section])[key] = value
    content.pop("fingerprint")
    path.write_text(json.dumps({"fingerprint": canonical_digest(content), **content}))
    (fault,) = corpus_faults(Corpus.open(corpus.folder))
    assert message in fault
