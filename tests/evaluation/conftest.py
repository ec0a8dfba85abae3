"""A tokenizer of single bytes and a model in a few lines of numpy: every number can be worked out by hand.

The model is a function of the tokens a slot sees. It reads a row's `end` array literally, so that a wrong
layout (a branch that sees a sibling, a document that sees its neighbour) gives another likelihood.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_iml.data.bench.folder import BenchFile, file_stem, manifest_bytes
from megatron_iml.data.corpus.tokenizer import Tokenizer, train_byte_level_bpe
from megatron_iml.data.rows.assemble import Row
from megatron_iml.evaluation.conditions import Conditions
from megatron_iml.evaluation.task import Evaluator

EOS = 2


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """4 special tokens and 256 bytes, no merges: one id per ASCII character."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(["a b c"], vocab_size=260, folder=folder)
    return Tokenizer.load(folder, backend="tokenizers")


@dataclass
class FakeCache:
    """The token history of every sequence in decoding."""

    histories: list[tuple[int, ...]]

    def keep(self, indices_K: np.ndarray) -> None:
        self.histories = [self.histories[i] for i in indices_K]


@dataclass
class FakeModel:
    """`log_likelihood(context, id)` ranks, `next_id(context)` generates; keeps what it was asked."""

    log_likelihood: Callable[[tuple[int, ...], int], float] = lambda context, target: 0.0
    next_id: Callable[[tuple[int, ...]], int] = lambda context: EOS
    rows: list[Row] = field(default_factory=list)
    prefills: list[list[tuple[int, ...]]] = field(default_factory=list)
    decoded_sizes: list[int] = field(default_factory=list)

    def target_losses(self, row: Row) -> np.ndarray:
        self.rows.append(row)
        losses = []
        for slot, target in zip(row.target_rows_M, row.target_ids_M, strict=True):
            seen = [col for col in range(slot + 1) if slot < row.layout.end_T[col]]
            assert row.layout.positions_T[seen].tolist() == list(range(len(seen)))
            context = tuple(int(row.tokens_T[col]) for col in seen)
            losses.append(-self.log_likelihood(context, int(target)))
        return np.array(losses, dtype=np.float32)

    def prefill(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> tuple[FakeCache, np.ndarray]:
        cache = FakeCache([tuple(prompt.tolist()) for prompt in prompts])
        self.prefills.append(list(cache.histories))
        return cache, np.array([self.next_id(history) for history in cache.histories])

    def decode(self, cache: FakeCache, tokens_B: np.ndarray) -> np.ndarray:
        assert len(tokens_B) == len(cache.histories)
        self.decoded_sizes.append(len(tokens_B))
        cache.histories = [(*h, int(t)) for h, t in zip(cache.histories, tokens_B, strict=True)]
        return np.array([self.next_id(history) for history in cache.histories])


@pytest.fixture
def fake_model() -> type[FakeModel]:
    """The class: a test gives it the likelihoods it needs."""
    return FakeModel


@pytest.fixture
def conditions() -> Conditions:
    """Small limits; every name and fingerprint is different."""
    return Conditions(
        checkpoint="runs/a",
        checkpoint_fingerprint="c1",
        bench_fingerprint="b1",
        tokenizer_fingerprint="t1",
        split="test",
        examples_per_task=0,
        scoring="sum",
        inference_prefix="none",
        max_new_tokens=4,
        max_positions=32,
        precision="fp32",
    )


@pytest.fixture
def evaluator(tokenizer: Tokenizer, conditions: Conditions) -> Evaluator:
    """Prefers the candidate "a", and says "x y" to every prompt."""
    [a, x, blank, y, colon] = tokenizer.encode("ax y:").tolist()
    script = {colon: blank, blank: x, x: y, y: EOS}
    model = FakeModel(
        log_likelihood=lambda context, target: -0.5 if target == a else -1.0,
        next_id=lambda context: script[context[-1]],
    )
    return Evaluator(model, tokenizer, conditions, row_length=32, batch_size=2)


def bench_file(
    folder: Path, level: str, benchmark: str, task: str, metric: str, rows: list[dict]
) -> BenchFile:
    """Write the rows as one file of the test split; its category is `cat`."""
    content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    path = folder / "test" / f"{file_stem(benchmark, 'cat', task)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    name = path.relative_to(folder).as_posix()
    return BenchFile(task, benchmark, "cat", level, "test", len(rows), metric, digest, name)


@pytest.fixture
def bench_folder(tmp_path: Path) -> Path:
    """Two tasks: "pick" ranks "a" and "b" (5 rows, the answer alternates), "say" generates (3 rows)."""
    pick = [{"id": f"p{i}", "src": f"{i}:", "tgt": "ab"[i % 2], "candidates": ["a", "b"]} for i in range(5)]
    say = [{"id": f"s{i}", "src": f"{i}:", "tgt": "x y", "references": ["x y", "z"]} for i in range(3)]
    folder = tmp_path / "bench"
    files = [
        bench_file(folder, "fully_held_out", "flan", "pick", "accuracy", pick),
        bench_file(folder, "fully_supervised", "sni", "say", "rouge_l", say),
    ]
    (folder / "manifest.json").write_bytes(manifest_bytes(1, {}, files))
    return folder
