"""Corpora: the joint encoding, Megatron's own reader on the same files, resuming, and damaged files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.corpus import Corpus, encode_document
from megatron_iml.data.corpus_build import BuildConfig, build_corpus
from megatron_iml.data.corpus_format import Shard, ShardWriter
from megatron_iml.data.tokenizer import Tokenizer, train_byte_level_bpe

ROOT = Path(__file__).parents[2]
OPT_FOLDER = ROOT.parent / "shared" / "devset" / "tokenizer" / "metaseq-opt"

ROWS = {
    "ALPHA__Sums__plus": [
        {"id": f"p{i}", "src": f"What is {i} + {i}?\nAnswer:", "tgt": f"{2 * i}"} for i in range(40)
    ],
    "ALPHA__Words__pairs__many": [
        {"id": "w0", "src": "A pair:", "tgt": "one two", "references": ["one two", "two one", "1 2 "]},
        {"id": "w1", "src": "Blank line\n", "tgt": "\nwell", "references": ["\nwell", "done", "\n\nyes"]},
        {"id": "w2", "src": "Trailing blanks  ", "tgt": "fine"},
    ],
    "PLAIN__Text__replay": [{"id": "r0", "src": "", "tgt": "Once upon a time. The answer is 7."}],
}


def write_bench(folder: Path, rows: dict[str, list[dict]], split: str = "train") -> Path:
    (folder / split).mkdir(parents=True)
    files = []
    for name, examples in rows.items():
        benchmark, category, task = name.split("__", 2)
        data = "".join(json.dumps(row) + "\n" for row in examples).encode()
        (folder / split / f"{name}.jsonl").write_bytes(data)
        files.append(
            {
                "task": task,
                "benchmark": benchmark,
                "category": category,
                "level": "fully_supervised",
                "split": split,
                "examples": len(examples),
                "metric": "rouge_l",
                "sha256": sha256(data).hexdigest(),
                "file": f"{split}/{name}.jsonl",
            }
        )
    manifest = {"format_version": 1, "seed": 1, "splits": {}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"{row['src']} {row['tgt']}" for rows in ROWS.values() for row in rows]
    texts += ["a\n \nb"] * 200  # so that white space has merges, which is what a boundary can break
    train_byte_level_bpe(texts, vocab_size=300, folder=folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def config(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    folder = tmp_path_factory.mktemp("corpus")
    bench = write_bench(folder / "bench", ROWS)
    return BuildConfig(bench=bench, split="train", tokenizer=tokenizer_folder, output=folder / "corpus")


def build(config: BuildConfig) -> Corpus:
    build_corpus(config, start=lambda examples: None, advance=lambda examples, tokens: None)
    return Corpus.open(config.output / config.split)


@pytest.fixture(scope="module")
def corpus(config: BuildConfig) -> Corpus:
    return build(config)


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
    assert corpus.num_references_D.tolist() == [corpus.num_references(d) for d in range(corpus.num_documents)]
    lengths = corpus.reference_lengths(documents, references).tolist()
    for (document, reference), length in zip(pairs, lengths, strict=True):
        tokens, source_length = corpus.tokens(document, reference)
        assert source_length == corpus.source_lengths_D[document]
        assert length == corpus.reference_length(document, reference) == len(tokens) - source_length
    task = corpus.task_records[1]
    stored = [corpus.reference_length(d, r) for d, r in pairs if d in task.documents]
    assert task.target_tokens == sum(stored)
    assert (
        task.tokens == sum(stored) + corpus.source_lengths_D[task.first_document : task.stop_document].sum()
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


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("change", [{"workers": 2}, {"backend": "tokenizers"}])
def test_bytes_do_not_depend_on_workers_or_backend(
    config: BuildConfig, corpus: Corpus, tmp_path: Path, change: dict
) -> None:
    other = build(replace(config, output=tmp_path, **change))
    assert digests(other.folder) == digests(corpus.folder)
    assert sorted(digests(corpus.folder)) == ["manifest.json", "shard-00000.bin", "shard-00000.idx"]


def test_shards_of_whole_tasks_hold_the_same_documents(
    config: BuildConfig, corpus: Corpus, tmp_path: Path
) -> None:
    sharded = build(replace(config, output=tmp_path, shard_examples=3))
    assert len(sharded.manifest["shards"]) == 3
    assert sharded.tasks == corpus.tasks
    assert sharded.source_lengths_D.tolist() == corpus.source_lengths_D.tolist()
    documents = np.arange(corpus.num_documents)
    last = corpus.num_references_D.astype(np.int64) - 1
    assert (
        sharded.reference_lengths(documents, last).tolist()
        == corpus.reference_lengths(documents, last).tolist()
    )
    for document in range(corpus.num_documents):
        assert sharded.tokens(document, int(last[document]))[0].tolist() == (
            corpus.tokens(document, int(last[document]))[0].tolist()
        )


def test_killed_build_keeps_its_finished_shards(config: BuildConfig, tmp_path: Path) -> None:
    sharded = replace(config, output=tmp_path, shard_examples=3)

    class Killed(Exception):
        pass

    def die_in_second_shard(examples: int, tokens: int) -> None:
        if examples == 3:
            raise Killed

    with pytest.raises(Killed):
        build_corpus(sharded, start=lambda examples: None, advance=die_in_second_shard)
    first = tmp_path / "train" / "shard-00000.bin"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "train" / "shard-00001.bin").exists()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        Corpus.open(tmp_path / "train")
    heard: list[int] = []
    build_corpus(
        sharded, start=lambda examples: None, advance=lambda examples, tokens: heard.append(examples)
    )
    assert first.stat().st_mtime_ns == written
    assert sum(heard) == 44
    whole = build(replace(sharded, output=tmp_path / "again"))
    assert digests(tmp_path / "train") == digests(whole.folder)


STALLED_BUILD = """
import sys, time
from pathlib import Path
from megatron_iml.data.corpus_build import BuildConfig, build_corpus

def stall(examples, tokens):
    print("stalled", flush=True)
    time.sleep(120)

if __name__ == "__main__":
    bench, tokenizer, output = map(Path, sys.argv[1:])
    build_corpus(BuildConfig(bench, "train", tokenizer, output, workers=2), lambda examples: None, stall)
"""


def test_killed_build_leaves_no_workers(config: BuildConfig, tmp_path: Path) -> None:
    script = tmp_path / "stalled_build.py"
    script.write_text(STALLED_BUILD)
    command = [sys.executable, script, config.bench, config.tokenizer, tmp_path / "corpus"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as building:
        assert building.stdout is not None
        assert building.stdout.readline() == b"stalled\n"
        children = psutil.Process(building.pid).children()
        assert len(children) >= 2
        building.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_output_built_from_something_else_is_refused(
    config: BuildConfig, corpus: Corpus, tmp_path: Path
) -> None:
    bench = write_bench(tmp_path / "bench", {"ALPHA__Sums__plus": ROWS["ALPHA__Sums__plus"][:5]})
    with pytest.raises(ValueError, match="holds a corpus built from .*remove it or choose another"):
        build(replace(config, bench=bench))
    with pytest.raises(ValueError, match="has no files of split 'test'; it has train"):
        build(replace(config, split="test"))


def test_row_count_and_malformed_rows(config: BuildConfig, tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench", {"A__B__c": ROWS["ALPHA__Sums__plus"]})
    file = bench / "train" / "A__B__c.jsonl"
    with file.open("a") as stream:
        stream.write('{"id": "x", "src": "s", "tgt": "t"}\n')
    with pytest.raises(ValueError, match="A__B__c.jsonl has 41 rows, the bench manifest says 40"):
        build(replace(config, bench=bench, output=tmp_path / "a"))
    with file.open("a") as stream:
        stream.write('{"id": "x", "src": "s"}\n')
    with pytest.raises(ValueError, match=r"A__B__c.jsonl:42: got .* expected an object with src and tgt"):
        build(replace(config, bench=bench, output=tmp_path / "b"))


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
    with pytest.raises(ValueError, match="format version 9, expected 1"):
        Corpus.open(folder)


def write_shard(stem: Path, documents: Sequence[Sequence[list[int]]], vocab_size: int) -> Shard:
    writer = ShardWriter(stem, vocab_size)
    for document in documents:
        ids = np.array([i for sequence in document for i in sequence], dtype=np.uint16)
        sizes = np.array([len(sequence) for sequence in document], dtype=np.int32)
        writer.write(ids, sizes, np.array([len(document)], dtype=np.int32))
    summary = writer.close()
    assert (summary.documents, summary.sequences) == (len(documents), sum(map(len, documents)))
    assert summary.bin_sha256 == sha256(stem.with_suffix(".bin").read_bytes()).hexdigest()
    assert summary.idx_sha256 == sha256(stem.with_suffix(".idx").read_bytes()).hexdigest()
    return Shard(stem)


def test_shard_by_hand(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s", [[[10, 11], [12, 2]], [[20, 21, 2]]], vocab_size=22)
    assert shard.sizes_S.tolist() == [2, 2, 3]
    assert shard.pointers_S.tolist() == [0, 4, 8]
    assert shard.boundaries_D.tolist() == [0, 2, 3]
    assert shard.read(0, 1).tolist() == [10, 11, 12, 2]
    assert shard.read(0, 2).tolist() == [10, 11, 20, 21, 2]
    assert (tmp_path / "s.bin").read_bytes() == bytes([10, 0, 11, 0, 12, 0, 2, 0, 20, 0, 21, 0, 2, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def test_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="id 22 is outside the vocabulary of 22"):
        write_shard(tmp_path / "s", [[[22, 2]]], vocab_size=22)
    assert not (tmp_path / "s.bin").exists()


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
