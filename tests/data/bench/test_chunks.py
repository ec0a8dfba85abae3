"""Bench files in pieces: whole lines in their order, cut at line feeds alone, refused when they changed."""

from pathlib import Path

import pytest
from corpora import write_bench

from megatron_iml.data.bench import chunks as bench_chunks
from megatron_iml.data.bench.chunks import read_chunks
from megatron_iml.data.bench.folder import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    # What str.splitlines or text mode would cut at.
    nasty = [
        {"id": f"{i}", "src": text, "tgt": text} for i, text in enumerate(["a\u2028b", "a\rb", "a\x85c"])
    ]
    rows = [{"id": f"{i}", "src": f"question {i}?", "tgt": f"answer {i}"} for i in range(300)]
    return Bench.open(write_bench(tmp_path / "bench", {"A__B__nasty": nasty, "A__B__plain": rows}))


def test_chunks_are_the_file_in_whole_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_chunks, "CHUNK_BYTES", 1000)
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


def test_a_changed_file_is_refused_at_its_end(bench: Bench) -> None:
    entry = bench.entries[1]
    path = bench.path(entry)
    path.write_bytes(path.read_bytes().replace(b"answer 299", b"answer 298"))
    chunks = read_chunks(bench, entry)
    next(chunks)
    with pytest.raises(ValueError, match="A__B__plain.jsonl was changed after the bench was built"):
        list(chunks)


def test_a_file_that_is_gone(bench: Bench) -> None:
    bench.path(bench.entries[1]).unlink()
    with pytest.raises(FileNotFoundError, match="plain.jsonl is in the manifest but not on disk; build"):
        next(read_chunks(bench, bench.entries[1]))
