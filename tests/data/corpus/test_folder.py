"""Corpora: the joint encoding, Megatron's own reader on the same files, and damaged files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.corpus.encoding import encode_document
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.corpus.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
OPT_FOLDER = ROOT.parent / "shared" / "devset" / "tokenizer" / "metaseq-opt"


def joint_reference(tokenizer: Tokenizer, source: str, target: str) -> tuple[list[int], list[int]]:
    """OPT-IML's own rule, literally: joint ids with the end, and how many of them are source."""
    source = source.rstrip(" ")
    full = tokenizer.encode(" ".join([source, target.rstrip()])).tolist() + [2]
    length = min(len(tokenizer.encode(source)), len(full) - 1)
    return full[:length], full[length:]


TEXT = st.text(alphabet="a 's\n\tis.1\u00a0\u2028", max_size=8)


@settings(max_examples=300, deadline=None)
@given(source=TEXT, targets=st.lists(TEXT, min_size=1, max_size=4))
def test_encoding_is_the_joint_one(tokenizer: Tokenizer, source: str, targets: list[str]) -> None:
    documents = encode_document(tokenizer, source, targets)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for document in documents:
        assert len(document.sequences) == (len(document.source) > 0) + len(document.targets)
        for reference, ids in zip(document.references, document.targets, strict=True):
            found[reference] = (document.source.tolist(), ids.tolist())
    assert sorted(found) == list(range(len(targets)))
    for i, target in enumerate(targets):
        assert found[i] == joint_reference(tokenizer, source, target)


def test_reference_that_changes_the_source_is_its_own_document(tokenizer: Tokenizer) -> None:
    # "\n" + " " + "\nx": the white space of both sides is one word, so the source would be encoded otherwise.
    documents = encode_document(tokenizer, "a\n", ["b", "\nb", "c"])
    assert [document.references for document in documents] == [(0, 2), (1,)]
    assert documents[0].source.tolist() == tokenizer.encode("a\n").tolist()
    assert documents[1].source.tolist() != documents[0].source.tolist()
    assert np.concatenate(documents[1].sequences).tolist() == [*tokenizer.encode("a\n \nb").tolist(), 2]


def test_documents_without_source_are_one_sequence_each(tokenizer: Tokenizer) -> None:
    documents = encode_document(tokenizer, "  ", ["one", "two"])
    assert [document.references for document in documents] == [(0,), (1,)]
    assert [ids.tolist() for ids in documents[0].sequences] == [[*tokenizer.encode(" one").tolist(), 2]]


def test_corpus_holds_every_row(corpus: Corpus, tokenizer: Tokenizer) -> None:
    # Row w1 has two references that change its source, hence 5 documents for 3 rows.
    assert {name: len(documents) for name, documents in corpus.tasks.items()} == {
        "ALPHA__Sums__plus": 40,
        "ALPHA__Words__pairs__many": 5,
        "PLAIN__Text__replay": 1,
    }
    tokens, source_length = corpus.tokens(3, 0)
    assert tokenizer.decode(tokens[:source_length]) == "What is 3 + 3?\nAnswer:"
    assert tokenizer.decode(tokens[source_length:]) == " 6"
    assert tokens[-1] == 2
    assert [tokenizer.decode(corpus.tokens(40, r)[0][corpus.tokens(40, r)[1] :]) for r in range(3)] == [
        " one two",
        " two one",
        " 1 2",
    ]
    tokens, source_length = corpus.tokens(45, 0)
    assert source_length == 0
    assert tokenizer.decode(tokens) == " Once upon a time. The answer is 7."


def test_corpus_names_its_tokenizer(corpus: Corpus, tokenizer: Tokenizer) -> None:
    assert corpus.tokenizer_sha256 == tokenizer.sha256
    assert corpus.padded_vocab_size == tokenizer.padded_vocab_size


def test_lengths_agree_with_tokens(corpus: Corpus) -> None:
    pairs = [(d, r) for d in range(corpus.num_documents) for r in range(corpus.num_references(d))]
    documents, references = np.array(pairs).T
    # In no order, and some of them only: documents are drawn from all over the corpus.
    some = np.arange(corpus.num_documents)[::-2]
    assert corpus.reference_counts(some).tolist() == [corpus.num_references(d) for d in some.tolist()]
    sources, targets = corpus.lengths(documents, references)
    for (document, reference), source, length in zip(pairs, sources, targets.tolist(), strict=True):
        tokens, source_length = corpus.tokens(document, reference)
        assert source_length == source
        assert length == len(tokens) - source_length
    task = corpus.task_records[1]
    stored = [length for (d, _), length in zip(pairs, targets.tolist(), strict=True) if d in task.documents]
    assert task.target_tokens == sum(stored)
    assert (
        task.tokens
        == sum(stored) + corpus.lengths(np.array(task.documents), np.zeros(len(task.documents), int))[0].sum()
    )


def test_handed_out_tokens_are_copies(corpus: Corpus) -> None:
    tokens, _ = corpus.tokens(0, 0)
    tokens[:] = 0
    assert corpus.tokens(0, 0)[0].any()


def test_megatron_reads_the_same_tokens(corpus: Corpus) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    # Its arrays are views on its map: it must outlive them.
    dataset = indexed_dataset.IndexedDataset(str(corpus.folder / "shard-00000"))
    assert dataset.index.dtype == np.uint16
    assert len(dataset.document_indices) == corpus.num_documents + 1
    for document in range(corpus.num_documents):
        first, stop = dataset.document_indices[document : document + 2].tolist()
        sequences = [np.array(dataset[sequence]).tolist() for sequence in range(first, stop)]
        for reference in range(corpus.num_references(document)):
            tokens, source_length = corpus.tokens(document, reference)
            split = [tokens[:source_length].tolist(), tokens[source_length:].tolist()]
            if len(sequences) == 1:
                assert split == [[], sequences[0]]
            else:
                assert split == [sequences[0], sequences[1 + reference]]


def copy_of(corpus: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.folder, tmp_path / "train"))


def test_truncated_bin_names_file_sizes_and_remedy(corpus: Corpus, tmp_path: Path) -> None:
    path = copy_of(corpus, tmp_path) / "shard-00000.bin"
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(size - 7)
    with pytest.raises(ValueError) as error:
        Corpus.open(path.parent)
    message = str(error.value)
    assert f"{path} is cut short: it has {size - 7} bytes, its index says {size}" in message
    assert "build_corpus.py" in message


def test_damaged_folders(corpus: Corpus, tmp_path: Path) -> None:
    folder = copy_of(corpus, tmp_path)
    index = folder / "shard-00000.idx"
    intact = index.read_bytes()
    for data, message in (
        (intact[:-8], "cut short"),
        (b"TNTIDX" + intact[6:], "no Megatron index"),
        (intact[:17] + b"\x04" + intact[18:], "dtype code 4, expected 1 and 8"),
    ):
        index.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Corpus.open(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="shard-00000.idx is missing"):
        Corpus.open(folder)
    index.write_bytes(intact)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"examples": 40', '"examples": 39'))
    with pytest.raises(ValueError, match="was changed after it was written"):
        Corpus.open(folder)
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="format version 9, allowed: 1"):
        Corpus.open(folder)


def test_large_vocabulary_is_refused(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    tokenizer.vocab_size = 65537
    with pytest.raises(
        ValueError, match="65537 entries, the corpus stores ids as uint16 and holds at most 65536"
    ):
        encode_document(tokenizer, "a", ["b"])


@pytest.mark.skipif(not OPT_FOLDER.is_dir(), reason=f"OPT's tokenizer is not at {OPT_FOLDER}")
def test_opt_example_of_the_module_head() -> None:
    opt = Tokenizer.load(OPT_FOLDER)
    (document,) = encode_document(opt, "Capital of Togo?\nAnswer:", ["Lome"])
    assert document.source.tolist() == [38632, 9, 255, 14744, 116, 50118, 33683, 35]
    assert document.targets[0].tolist() == [226, 4399, 2]
