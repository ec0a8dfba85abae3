"""One small tokenizer, bench and corpus for the tests of the corpus; built once."""

from pathlib import Path

import pytest
from corpora import ROWS, build, write_bench

from megatron_iml.data.corpus import Corpus
from megatron_iml.data.corpus_build import BuildConfig
from megatron_iml.data.tokenizer import Tokenizer, train_byte_level_bpe


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
