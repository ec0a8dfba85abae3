"""Hashes of n-grams: the same for the same words, wherever they stand."""

import numpy as np
import pytest
from nltk.tokenize import RegexpTokenizer

from megatron_iml.data.contamination.ngrams import NgramHasher

hasher = NgramHasher(3)


def test_every_run_of_words_of_every_text_has_a_hash() -> None:
    hashes, texts = hasher.hashes(["one two three four", "one two", "zero one two three"])
    assert texts.tolist() == [0, 0, 2, 2]
    assert len(set(hashes.tolist())) == 3
    assert hashes[0] == hashes[3], "one two three, in two texts"


def test_runs_do_not_cross_texts() -> None:
    joined, _ = hasher.hashes(["one two three"])
    apart, _ = hasher.hashes(["one two", "three"])
    assert len(joined) == 1 and len(apart) == 0


def test_case_and_punctuation_do_not_hide_a_run() -> None:
    plain, _ = hasher.hashes(["the cat sat"])
    dressed, _ = hasher.hashes(["The cat, \u201csat!"])
    assert plain.tolist() == dressed.tolist()


def test_order_and_words_count() -> None:
    runs = ["the cat sat", "cat the sat", "the cat sits", "the the sat"]
    assert len({hasher.hashes([run])[0].item() for run in runs}) == 4


def test_hashes_are_the_same_in_every_process() -> None:
    # A digest of the words themselves, never Python's hash(), which differs from process to process.
    assert hasher.hashes(["the cat sat"])[0].tolist() == [7402263501960743687]


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_iml.data.contamination.ngrams.LARGEST_MEMORY", 10)
    small = NgramHasher(1)
    text = " ".join(f"word{i}" for i in range(500))
    first, _ = small.hashes([text])
    assert len(small._word_hashes) <= 10
    assert np.array_equal(small.hashes([text])[0], first)


def test_words_are_the_tokens_of_nltk() -> None:
    texts = ["It's 3.14, isn't_it?", "na\u00efve \u00dcBER\u2028stra\u00dfe", "\u4f60\u597d 42%\t[SEP]", ""]
    nltk_tokens = [RegexpTokenizer(r"\w+").tokenize(text.lower()) for text in texts]
    assert [hasher.words(text) for text in texts] == nltk_tokens


def test_empty_and_zero() -> None:
    assert len(hasher.hashes([])[0]) == 0
    assert len(hasher.hashes(["", "!"])[0]) == 0
    with pytest.raises(ValueError, match="n-grams of 0 words"):
        NgramHasher(0)
