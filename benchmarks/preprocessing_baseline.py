"""The loop of Megatron's preprocess_data.py, one worker of it, on bench files: what ours is compared with.

    python benchmarks/preprocessing_baseline.py --input work/bench --tokenizer-model opt-tokenizer

Per line: `json.loads`, `tokenizers` on one text at a time, ids to a file through numpy, lengths to a list, as
Megatron's `IndexedDatasetBuilder` does. Printed: documents a second of wall and of CPU time, and of our
encoder in this process on the same lines; and whether the ids of every document are the same.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from megatron_iml.data.bench.chunks import read_chunks
from megatron_iml.data.bench.folder import Bench
from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.data.corpus.workers import EncodedChunk, encode_chunk


def lines_of(bench: Bench) -> Iterator[bytes]:
    """Lines of all training files."""
    for entry in bench.files("train"):
        with bench.path(entry).open("rb") as file:
            yield from file


def baseline(lines: list[bytes], folder: Path, output: Path) -> list[int]:
    """Megatron's loop; returns the lengths of the documents, whose ids are in `output`."""
    vocab, merges = next(folder.glob("*vocab.json")), next(folder.glob("*merges.txt"))
    tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    lengths = []
    with output.open("wb") as file:
        for line in lines:
            # json and not orjson, text by text and not in batches: that is Megatron's loop.
            row = json.loads(line)
            # One sequence per document, as preprocess_data.py writes without --split-sentences.
            ids = [*tokenizer.encode(f"{row['src'].rstrip(' ')} {row['tgt'].rstrip()}").ids, 2]
            file.write(np.array(ids, dtype=np.uint16).tobytes())
            lengths.append(len(ids))
    return lengths


def encode(bench: Bench, tokenizer: Path, documents: int) -> list[EncodedChunk]:
    """Our encoder on at least as many documents."""
    encoded: list[EncodedChunk] = []
    loaded = Tokenizer.load(tokenizer)
    for entry in bench.files("train"):
        for chunk in read_chunks(bench, entry):
            encoded.append(encode_chunk(chunk, loaded))
            if sum(piece.examples for piece in encoded) >= documents:
                return encoded
    return encoded


def first_references(encoded: list[EncodedChunk]) -> Iterator[np.ndarray]:
    """Source and first reference of every document, which lie end to end."""
    for chunk in encoded:
        flat = chunk.documents
        ends = np.cumsum(flat.sizes_S)
        # Sequence numbers of each document's source; its first reference is the next one.
        for start in (np.cumsum(flat.counts_D) - flat.counts_D).tolist():
            yield flat.ids_T[ends[start] - flat.sizes_S[start] : ends[start + 1]]


def main() -> None:
    """Time both and compare ids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="bench folder")
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=50_000)
    arguments = parser.parse_args()
    bench = Bench.open(arguments.input)
    # In memory before the clock starts: reading is in neither of the loop's numbers.
    lines = list(islice(lines_of(bench), arguments.documents))
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        lengths = baseline(lines, arguments.tokenizer_model, Path(folder) / "ids.bin")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"preprocess_data.py's loop: {len(lines) / wall:,.0f}/s, {len(lines) / cpu:,.0f}/s of CPU time")
        theirs = np.fromfile(Path(folder) / "ids.bin", dtype=np.uint16)
    cpu = time.process_time()
    encoded = encode(bench, arguments.tokenizer_model, len(lines))
    cpu = time.process_time() - cpu
    documents = sum(piece.examples for piece in encoded)
    print(f"ours, reading and encoding in one process: {documents / cpu:,.0f}/s of CPU time")
    expected = np.split(theirs, np.cumsum(lengths)[:-1])
    # A speed is worth something only if the ids are the same.
    equal = sum(map(np.array_equal, first_references(encoded), expected))
    print(f"{equal:,} of {len(lines):,} documents have the ids of `tokenizers`")


if __name__ == "__main__":
    main()
