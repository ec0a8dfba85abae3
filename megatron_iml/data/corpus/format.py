"""Megatron's indexed dataset (`.bin` and `.idx`, MMIDIDX), written as a stream and read through a map.

A shard of two documents, [10 11] -> [12 2] and [20 21 2] (one sequence only), is

    shard-00000.bin   10 11 12 2 20 21 2             uint16, sequences end to end
    shard-00000.idx   "MMIDIDX\\0\\0", version 1, dtype code 8, 3 sequences, 3 boundaries
                      sizes      2 2 3               int32 [S], tokens
                      pointers   0 4 8               int64 [S], bytes into .bin
                      boundaries 0 2 3               int64 [D+1], first sequence of every document

megatron-core's `IndexedDataset` reads both files. Not used here: importing it costs all of megatron-core and
3 seconds, its arrays crash the process once the dataset is collected, and it checks neither ids nor sizes.

Suffixes: S sequences, D documents, T tokens.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.files import HashingFile

UInt16 = NDArray[np.uint16]

MAGIC = b"MMIDIDX\x00\x00"
# "<" packs without gaps: 34 bytes, so that no array behind it is aligned. numpy reads them all the same.
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
VERSION = 1
# megatron-core's DType.uint16. Its `modes` behind the boundaries belong to multimodal data alone.
DTYPE_CODE_UINT16 = 8
TOKEN_BYTES = 2
COPY_ELEMENTS = 1 << 20  # index arrays are written in slices of this many, so that memory stays flat


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What one shard holds, and the digests of its files."""

    documents: int
    sequences: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Streams documents into one shard; `close` makes it visible under its name, nothing before does.

    Memory is flat in the number of documents: sizes go to a temporary file beside the `.bin`.
    """

    def __init__(self, stem: Path, vocab_size: int) -> None:
        self._stem = stem
        self._vocab_size = vocab_size
        self._bin = HashingFile(stem.with_suffix(".bin.partial"))
        self._sizes_path = stem.with_suffix(".sizes.partial")
        self._counts_path = stem.with_suffix(".counts.partial")
        self._sizes_file = self._sizes_path.open("wb")
        self._counts_file = self._counts_path.open("wb")
        self._tokens = self._sequences = self._documents = 0

    def write(self, ids_T: UInt16, sizes_S: NDArray[np.int32], counts_D: NDArray[np.int32]) -> None:
        """Append documents: their tokens end to end, tokens per sequence, sequences per document.

        Raises ValueError for an id outside the vocabulary.
        """
        assert ids_T.dtype == np.uint16, f"tokens are {ids_T.dtype}, the format holds uint16"
        assert len(ids_T) == sizes_S.sum(), f"{len(ids_T)} tokens, sizes say {sizes_S.sum()}"
        assert len(sizes_S) == counts_D.sum(), f"{len(sizes_S)} sequences, documents say {counts_D.sum()}"
        # An id beyond the vocabulary reads past the embedding, on a GPU an error without a place.
        if len(ids_T) and int(ids_T.max()) >= self._vocab_size:
            raise ValueError(
                f"id {int(ids_T.max())} is outside the vocabulary of {self._vocab_size}; the text was "
                "encoded with another tokenizer than the one named"
            )
        self._bin.write(ids_T.astype("<u2").tobytes())
        self._sizes_file.write(sizes_S.astype("<i4").tobytes())
        self._counts_file.write(counts_D.astype("<i4").tobytes())
        self._tokens += len(ids_T)
        self._sequences += len(sizes_S)
        self._documents += len(counts_D)

    def close(self) -> ShardSummary:
        """Write the index, move both files to their names and return what they hold."""
        assert self._tokens > 0, f"shard {self._stem} would be empty, which cannot be mapped"
        bin_sha256 = self._bin.close()
        self._sizes_file.close()
        self._counts_file.close()
        idx_partial = self._stem.with_suffix(".idx.partial")
        idx_sha256 = self._write_index(idx_partial)
        # Only now under their names: a build that was killed leaves nothing that could be opened.
        self._bin.path.replace(self._stem.with_suffix(".bin"))
        idx_partial.replace(self._stem.with_suffix(".idx"))
        self._sizes_path.unlink()
        self._counts_path.unlink()
        return ShardSummary(self._documents, self._sequences, self._tokens, bin_sha256, idx_sha256)

    def _write_index(self, path: Path) -> str:
        index = HashingFile(path)
        index.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODE_UINT16, self._sequences, self._documents + 1))
        for sizes in _slices(self._sizes_path):
            index.write(sizes.tobytes())
        for pointers in _running_starts(self._sizes_path):
            index.write((pointers * TOKEN_BYTES).tobytes())
        for boundaries in _running_starts(self._counts_path):
            index.write(boundaries.tobytes())
        # The last boundary is the end, one more than there are documents.
        index.write(struct.pack("<q", self._sequences))
        return index.close()


def _slices(path: Path) -> Iterator[NDArray[np.int32]]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, dtype="<i4", count=COPY_ELEMENTS)):
            yield values


def _running_starts(path: Path) -> Iterator[NDArray[np.int64]]:
    """Yield, slice by slice, where each element starts when all are laid end to end: 2 2 3 -> 0 2 4."""
    start = 0
    for sizes in _slices(path):
        # In 64 bits: each size fits 32, a shard's tokens need not.
        stops = start + np.cumsum(sizes, dtype=np.int64)
        yield stops - sizes
        start = int(stops[-1])


class Shard:
    """One `.bin`/`.idx` pair, mapped read-only: opening reads the header, using it reads what is used."""

    def __init__(self, stem: Path) -> None:
        """Map a pair. Raises FileNotFoundError or ValueError when a file is missing, foreign or cut short."""
        bin_path, idx_path = stem.with_suffix(".bin"), stem.with_suffix(".idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {_rebuild(path)}")
        sequences, boundaries = _read_header(idx_path)
        at = HEADER.size
        self.sizes_S = _mapped(idx_path, np.int32, at, sequences)
        at += sequences * 4
        self.pointers_S = _mapped(idx_path, np.int64, at, sequences)
        at += sequences * 8
        self.boundaries_D = _mapped(idx_path, np.int64, at, boundaries)
        self.num_documents = boundaries - 1
        # The end of the last sequence is all that the file may hold: a cut copy is found at opening.
        _check_size(bin_path, int(self.pointers_S[-1]) + int(self.sizes_S[-1]) * TOKEN_BYTES)
        self.tokens_T = _mapped(bin_path, np.uint16, 0, bin_path.stat().st_size // TOKEN_BYTES)

    def read(self, first: int, sequence: int) -> UInt16:
        """Return sequence `first` followed by `sequence` (once if they are the same), a uint16 copy."""
        tokens_T, sizes_S, pointers_S = self.tokens_T, self.sizes_S, self.pointers_S
        start = int(pointers_S[first]) // TOKEN_BYTES
        if sequence - first <= 1:  # neighbours: one copy
            stop = int(pointers_S[sequence]) // TOKEN_BYTES + int(sizes_S[sequence])
            return tokens_T[start:stop].copy()
        other = int(pointers_S[sequence]) // TOKEN_BYTES
        return np.concatenate(
            (tokens_T[start : start + int(sizes_S[first])], tokens_T[other : other + int(sizes_S[sequence])])
        )


def _mapped(path: Path, dtype: type, offset: int, count: int) -> NDArray:
    # A plain view of the map: np.memmap's own indexing costs several microseconds per element.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


def _read_header(idx_path: Path) -> tuple[int, int]:
    """Return numbers of sequences and of document boundaries, after checking that the file holds them."""
    with idx_path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(
            f"{idx_path} is no Megatron index: it starts with {head[:9]!r}, expected {MAGIC!r}; "
            f"{_rebuild(idx_path)}"
        )
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    # 32-bit ids of other vocabularies are valid Megatron files, but not ours.
    if (version, code) != (VERSION, DTYPE_CODE_UINT16):
        raise ValueError(
            f"{idx_path} has version {version} and dtype code {code}, expected {VERSION} and "
            f"{DTYPE_CODE_UINT16} (uint16); {_rebuild(idx_path)}"
        )
    _check_size(idx_path, HEADER.size + 12 * sequences + 8 * boundaries)
    return sequences, boundaries


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size
    if actual != expected:
        what = "cut short" if actual < expected else "too long"
        raise ValueError(
            f"{path} is {what}: it has {actual} bytes, its index says {expected}; copy it again or "
            f"{_rebuild(path)}"
        )


def _rebuild(path: Path) -> str:
    # A finished corpus is not built a second time while its manifest stands.
    return f"remove {path.parent} and build it anew with tools/preprocess/build_corpus.py"
