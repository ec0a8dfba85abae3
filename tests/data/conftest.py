"""Small corpora for the tests of the data floor, built once."""

from pathlib import Path

import numpy as np
import pytest
from corpora import ROWS, build, random_documents, write_bench, write_corpus

from megatron_iml.data.corpus.build import BuildConfig
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.corpus.tokenizer import Tokenizer, train_byte_level_bpe


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"{row['src']} {row['tgt']}" for rows in ROWS.values() for row in rows]
    texts += ["a\n \nb"] * 200  # so that white space has merges, which is what a boundary can break
    train_byte_level_bpe(texts, vocab_size=300, folder=folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def config(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    folder = tmp_path_factory.mktemp("corpus")
    bench = write_bench(folder / "bench", ROWS)
    return BuildConfig(bench=bench, split="train", tokenizer=tokenizer_folder, output=folder / "corpus")


@pytest.fixture(scope="session")
def corpus(config: BuildConfig) -> Corpus:
    return build(config)


@pytest.fixture(scope="session")
def mixed_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Four tasks of two benchmarks with references, cuts and drops of every kind."""
    rng = np.random.default_rng(3)
    tasks = {f"B{k % 2}__c__t{k}": random_documents(rng, 10 + 20 * k) for k in range(4)}
    levels = {"B1__c__t3": "fully_held_out"}
    return write_corpus(tmp_path_factory.mktemp("packing") / "corpus", tasks, levels)
