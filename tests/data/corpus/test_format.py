"""Shards: bytes by hand, digests, and ids that no vocabulary has."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from megatron_iml.data.corpus.format import Shard, ShardWriter


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
