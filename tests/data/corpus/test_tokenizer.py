"""Tokenizers: OPT's own ids, equality of both backends, exact decoding, deterministic training."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.corpus.tokenizer import NASTY_TEXTS, Tokenizer, train_byte_level_bpe

OPT_FOLDER = Path(__file__).parents[3].parent / "shared" / "devset" / "tokenizer" / "metaseq-opt"
needs_opt = pytest.mark.skipif(not OPT_FOLDER.is_dir(), reason=f"OPT's tokenizer is not at {OPT_FOLDER}")

TEXTS = [f"The answer to question {i} is {i * 7 % 13}, not {i % 5}.\nWhy? Because." for i in range(200)]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(TEXTS, vocab_size=300, folder=folder)
    return folder


@pytest.fixture(scope="module")
def small(small_folder: Path) -> Tokenizer:
    return Tokenizer.load(small_folder)


@pytest.fixture(scope="module")
def reference(small_folder: Path) -> Tokenizer:
    return Tokenizer.load(small_folder, backend="tokenizers")


def test_trained_vocabulary(small: Tokenizer, small_folder: Path) -> None:
    vocab = json.loads((small_folder / "vocab.json").read_text(encoding="utf-8"))
    assert [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])][:4] == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
    ]
    assert (small.vocab_size, small.padded_vocab_size, small.eos_id) == (300, 304, 2)
    assert len(small.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_writes_the_same_bytes_twice(small_folder: Path, tmp_path: Path) -> None:
    train_byte_level_bpe(iter(TEXTS), vocab_size=300, folder=tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (small_folder / name).read_bytes()


@pytest.mark.parametrize(("vocab_size", "message"), [(259, "at least 260"), (5000, "only give")])
def test_impossible_vocabulary_sizes(tmp_path: Path, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_byte_level_bpe(TEXTS, vocab_size=vocab_size, folder=tmp_path)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_backends_agree_and_decode_is_exact(small: Tokenizer, reference: Tokenizer, text: str) -> None:
    assert small.encode(text).tolist() == reference.encode(text).tolist()
    assert small.decode(small.encode(text)) == text


def test_batch_equals_one_by_one(small: Tokenizer) -> None:
    texts = [*NASTY_TEXTS, *TEXTS[:5]]
    for text, ids in zip(texts, small.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == small.encode(text).tolist()


def test_decode_skips_specials_and_refuses_padded_rows(small: Tokenizer) -> None:
    ids = small.encode("answer").tolist()
    assert small.decode([0, 1, *ids, 3, 2]) == "answer"
    with pytest.raises(ValueError, match=r"id 301: the vocabulary has ids 0\.\.299"):
        small.decode([301])


def test_text_cannot_forge_a_special_token(small: Tokenizer) -> None:
    assert not set(small.encode("a</s><s><pad><unk>").tolist()) & {0, 1, 2, 3}


def test_verify_finds_a_wrong_encoder(small_folder: Path, tmp_path: Path) -> None:
    train_byte_level_bpe(TEXTS[:50], vocab_size=290, folder=tmp_path)
    tokenizer = Tokenizer.load(small_folder)
    assert tokenizer.verify(TEXTS[:3]) == len(NASTY_TEXTS) + 3
    tokenizer._reference = Tokenizer.load(tmp_path)._reference
    with pytest.raises(ValueError, match="backend gigatoken encodes"):
        tokenizer.verify(TEXTS)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected vocab.json \+ merges.txt or"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}', encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab.json: special tokens .* have ids \[None"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text(
        '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="255 of the 256 bytes have no entry"):
        Tokenizer.load(tmp_path)


@needs_opt
def test_opt_vocabulary() -> None:
    opt = Tokenizer.load(OPT_FOLDER)
    assert (opt.vocab_size, opt.padded_vocab_size, opt.eos_id) == (50265, 50272, 2)
    assert opt.encode("Hello world").tolist() == [31414, 232]
    assert opt.encode("\n\n\n").tolist() == [50140, 50118]
    opt.verify(TEXTS)
    for text in NASTY_TEXTS:
        assert opt.decode(opt.encode(text)) == text


def test_a_broken_vocabulary_names_its_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_bytes((tokenizer_folder / "merges.txt").read_bytes())
    (tmp_path / "vocab.json").write_text('{"<s>": 0, ')
    with pytest.raises(ValueError, match="vocab.json: not valid JSON"):
        Tokenizer.load(tmp_path)


def test_an_encoder_made_anew_gives_the_same_ids(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(small_folder)
    texts = [f"What is {i} + {i}?" for i in range(50)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    first = tokenizer._fast
    monkeypatch.setattr("megatron_iml.data.corpus.tokenizer.RENEWAL_CHARACTERS", 100)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    assert tokenizer._fast is not first
