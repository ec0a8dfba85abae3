"""The loop of Megatron's preprocess_data.py, one worker of it, on bench files: what ours is compared with.

    python benchmarks/preprocessing_baseline.py --bench work/bench --tokenizer-model opt-tokenizer

Per line: `json.loads`, `tokenizers` on one text at a time, a tensor for Megatron's `IndexedDatasetBuilder`.
Printed: documents a second of wall and of CPU time, and of our encoder in this process on the same lines; and
whether the ids of every document are the same.
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
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_iml.data.bench import Bench
from megatron_iml.data.corpus_chunks import encode_chunk, read_chunks


def lines_of(bench: Bench) -> Iterator[bytes]:
    """Lines of all training files."""
    for entry in bench.files("train"):
        with bench.path(entry).open("rb") as file:
            yield from file


def baseline(lines: list[bytes], folder: Path, prefix: Path) -> None:
    """Megatron's loop."""
    vocab, merges = next(folder.glob("*vocab.json")), next(folder.glob("*merges.txt"))
    tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for line in lines:
        row = json.loads(line)
        # One sequence per document, as preprocess_data.py writes without --split-sentences.
        ids = [*tokenizer.encode(f"{row['src'].rstrip(' ')} {row['tgt'].rstrip()}").ids, 2]
        builder.add_item(torch.IntTensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def main() -> None:
    """Time both and compare ids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=50_000)
    arguments = parser.parse_args()
    bench = Bench.open(arguments.bench)
    lines = list(islice(lines_of(bench), arguments.documents))
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "megatron"
        wall, cpu = time.perf_counter(), time.process_time()
        baseline(lines, arguments.tokenizer_model, prefix)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"preprocess_data.py's loop: {len(lines) / wall:,.0f}/s, {len(lines) / cpu:,.0f}/s of CPU time")
        theirs = IndexedDataset(str(prefix))
        ours_cpu, equal, document = time.process_time(), 0, 0
        encoded = []
        for entry in bench.files("train"):
            for chunk in read_chunks(bench, entry):
                encoded.append(encode_chunk(chunk, arguments.tokenizer_model, "gigatoken"))
                document += encoded[-1].examples
                if document >= len(lines):
                    break
            if document >= len(lines):
                break
        ours_cpu = time.process_time() - ours_cpu
        print(f"ours, reading and encoding in one process: {document / ours_cpu:,.0f}/s of CPU time")
        document = 0
        for chunk in encoded:
            flat = chunk.documents
            ends = np.cumsum(flat.sizes_S)
            first = np.concatenate([[0], np.cumsum(flat.counts_D)])
            for start in first[:-1].tolist():
                if document < len(lines):
                    # Source and first reference, which lie end to end.
                    ids = flat.ids_T[ends[start] - flat.sizes_S[start] : ends[start + 1]]
                    equal += bool(np.array_equal(ids, theirs[document]))
                document += 1
        print(f"{equal:,} of {len(lines):,} documents have the ids of `tokenizers`")


if __name__ == "__main__":
    main()
