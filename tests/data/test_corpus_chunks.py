"""Bench files in pieces: whole lines in their order, cut at line feeds alone, refused when they changed."""

from pathlib import Path

import pytest
from corpora import write_bench

from megatron_iml.data import corpus_chunks
from megatron_iml.data.bench import Bench
from megatron_iml.data.corpus_chunks import encode_chunk, encode_in_order, read_chunks
from megatron_iml.data.jobs import worker_pool

# What str.splitlines, text mode or C strings would cut at.
NASTY = ["a\u2028b", "a\u2029b\x85c", "a\rb", "a\r\nb", "a\x00b", "a\x0b\x0c\x1cb", "\ufeffa", "\ufffd"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    nasty = [{"id": f"{i}", "src": text, "tgt": text} for i, text in enumerate(NASTY)]
    rows = [{"id": f"{i}", "src": f"question {i}?", "tgt": f"answer {i}"} for i in range(300)]
    return Bench.open(write_bench(tmp_path / "bench", {"A__B__nasty": nasty, "A__B__plain": rows}))


def test_chunks_are_the_file_in_whole_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_chunks, "CHUNK_BYTES", 1000)
    for entry in bench.entries:
        chunks = list(read_chunks(bench, entry))
        assert b"".join(chunk.data for chunk in chunks) == bench.path(entry).read_bytes()
        assert all(chunk.data.endswith(b"\n") for chunk in chunks)
        first = 1
        for chunk in chunks:
            assert chunk.first_line == first
            first += chunk.data.count(b"\n")
        assert first == entry.examples + 1
    assert len(chunks) > 10


def test_no_character_ends_a_row_or_gets_lost(bench: Bench, tokenizer_folder: Path) -> None:
    (chunk,) = read_chunks(bench, bench.entries[0])
    encoded = encode_chunk(chunk, tokenizer_folder, "gigatoken")
    reference = encode_chunk(chunk, tokenizer_folder, "tokenizers")
    assert encoded.examples == len(NASTY) == len(encoded.documents.counts_D)
    assert encoded.documents.ids_T.tolist() == reference.documents.ids_T.tolist()


def test_workers_keep_the_order(
    bench: Bench, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_chunks, "CHUNK_BYTES", 500)

    def encoded(workers: int) -> list[list[int]]:
        chunks = (chunk for entry in bench.entries for chunk in read_chunks(bench, entry))
        with worker_pool(workers) as pool:
            pieces = encode_in_order(chunks, tokenizer_folder, "gigatoken", pool, ahead=3)
            return [piece.documents.ids_T.tolist() for piece in pieces]

    alone = encoded(1)
    assert len(alone) > 20
    assert encoded(2) == alone


def test_a_changed_file_is_refused_at_its_end(bench: Bench) -> None:
    entry = bench.entries[1]
    path = bench.path(entry)
    path.write_bytes(path.read_bytes().replace(b"answer 299", b"answer 298"))
    chunks = read_chunks(bench, entry)
    next(chunks)
    with pytest.raises(ValueError, match="A__B__plain.jsonl was changed after the bench was built"):
        list(chunks)
