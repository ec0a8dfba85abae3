"""Encoding in workers: no character ends a row, and the order is that of the file."""

from pathlib import Path

import pytest
from corpora import write_bench

from megatron_iml.data.bench import chunks as bench_chunks
from megatron_iml.data.bench.chunks import read_chunks
from megatron_iml.data.bench.folder import Bench
from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.data.corpus.workers import encode_chunk, encode_in_order
from megatron_iml.data.jobs import worker_pool

# What str.splitlines, text mode or C strings would cut at.
NASTY = ["a\u2028b", "a\u2029b\x85c", "a\rb", "a\r\nb", "a\x00b", "a\x0b\x0c\x1cb", "\ufeffa", "\ufffd"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    nasty = [{"id": f"{i}", "src": text, "tgt": text} for i, text in enumerate(NASTY)]
    rows = [{"id": f"{i}", "src": f"question {i}?", "tgt": f"answer {i}"} for i in range(300)]
    return Bench.open(write_bench(tmp_path / "bench", {"A__B__nasty": nasty, "A__B__plain": rows}))


def test_no_character_ends_a_row_or_gets_lost(bench: Bench, tokenizer_folder: Path) -> None:
    (chunk,) = read_chunks(bench, bench.entries[0])
    encoded = encode_chunk(chunk, Tokenizer.load(tokenizer_folder, "gigatoken"))
    reference = encode_chunk(chunk, Tokenizer.load(tokenizer_folder, "tokenizers"))
    assert encoded.examples == len(NASTY) == len(encoded.documents.counts_D)
    assert encoded.documents.ids_T.tolist() == reference.documents.ids_T.tolist()


def test_workers_keep_the_order(
    bench: Bench, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_chunks, "CHUNK_BYTES", 500)

    def encoded(workers: int) -> list[list[int]]:
        chunks = (chunk for entry in bench.entries for chunk in read_chunks(bench, entry))
        with worker_pool(workers) as pool:
            pieces = encode_in_order(chunks, tokenizer, tokenizer_folder, pool, ahead=3)
            return [piece.documents.ids_T.tolist() for piece in pieces]

    alone = encoded(1)
    assert len(alone) > 20
    assert encoded(2) == alone
