"""Rank classification: known likelihoods, and prefix trees against one document per candidate."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.evaluation.prompts import PromptRules
from megatron_iml.evaluation.question import Question
from megatron_iml.evaluation.ranking import Tree, encode_candidates, grow_trees, pack_trees, rank

ANY = PromptRules((), 64)


def question(prompt: str, *candidates: str) -> Question:
    return Question("q", prompt, (candidates[0],), candidates)


def hashed_likelihood(context: tuple[int, ...], target: int) -> float:
    """An arbitrary number in (-8, 0] that any change of context or target changes."""
    digest = hashlib.sha256(repr((context, target)).encode()).digest()
    return -8 * int.from_bytes(digest[:4], "little") / 2**32


def rank_all(
    model: Any, tokenizer: Tokenizer, questions: list[Question], rules: PromptRules = ANY, **settings: Any
) -> list[Any]:
    settings = {"row_length": 64, "scoring": "sum", **settings}
    return rank(model, tokenizer, questions, rules=rules, track=lambda rows: rows, **settings)


def alone(tokenizer: Tokenizer, prompt: str, candidate: str, prefix: tuple[int, ...] = ()) -> list[float]:
    """Log-likelihoods of a candidate's tokens as the definition says: no packing, no sharing, no array."""
    tokens = [*prefix, *tokenizer.encode(f"{prompt} {candidate}").tolist(), 2]
    first = len(prefix) + len(tokenizer.encode(prompt))
    return [hashed_likelihood(tuple(tokens[:j]), tokens[j]) for j in range(first, len(tokens))]


def test_uniform_model_gives_length_times_log_probability(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(lambda context, target: math.log(1 / 260))
    [sums] = rank_all(model, tokenizer, [question("p:", "yes", "no")])
    # " yes" is four bytes and </s>, " no" three and </s>.
    assert sums.scores == pytest.approx((-5 * math.log(260), -4 * math.log(260)))
    [means] = rank_all(model, tokenizer, [question("p:", "yes", "no")], scoring="mean")
    assert means.scores == pytest.approx((-math.log(260), -math.log(260)))


def test_known_likelihoods(tokenizer: Tokenizer, fake_model: Any) -> None:
    [y, n] = tokenizer.encode("yn").tolist()
    values = {y: -1.0, n: -3.0, 2: -0.5}
    model = fake_model(lambda context, target: values.get(target, -0.25))
    [result] = rank_all(model, tokenizer, [question("p:", "n", "y")])
    assert result.scores == pytest.approx((-0.25 - 3.0 - 0.5, -0.25 - 1.0 - 0.5))
    assert result.cut_tokens == 0


@pytest.mark.parametrize("prefix", [(), (2,)])
def test_trees_score_like_one_document_per_candidate(
    tokenizer: Tokenizer, fake_model: Any, prefix: tuple[int, ...]
) -> None:
    questions = [
        question("Is it?\nA:", "yes", "yesterday", "no", "yes and no", ""),
        question("Which:", "cat", "dog"),
        question("x", "the same", "the other", "other"),
        question("one:", "only"),
        # Each tree nearly fills a row; with six candidates this one needs two.
        question("a rather long prompt, on purpose", *(f"choice {i} of six" for i in range(6))),
    ]
    model = fake_model(hashed_likelihood)
    results = rank_all(model, tokenizer, questions, PromptRules(prefix, 64))
    for asked, result in zip(questions, results, strict=True):
        expected = [math.fsum(alone(tokenizer, asked.prompt, c, prefix)) for c in asked.candidates]
        assert result.scores == pytest.approx(expected, rel=1e-6)
    assert len(model.rows) < sum(len(asked.candidates) for asked in questions)


def test_prompt_is_stored_once(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(hashed_likelihood)
    rank_all(model, tokenizer, [question("prompt:", "a", "b", "c")])
    # 7 prompt bytes and the blank are shared; each candidate stores its letter.
    assert model.rows[0].layout.num_real == 7 + 1 + 3
    assert model.rows[0].layout.num_targets == 3 * 3


def test_all_candidates_see_the_same_cut_prompt(tokenizer: Tokenizer, fake_model: Any) -> None:
    model = fake_model(hashed_likelihood)
    rules = PromptRules((), 10)
    [result] = rank_all(model, tokenizer, [question("0123456789", "long", "s")], rules, row_length=10)
    # 10 positions hold 11 tokens; " long" and </s> take 6, which leaves the last 5 of 10.
    assert result.cut_tokens == 5
    expected = [math.fsum(alone(tokenizer, "56789", candidate)) for candidate in ("long", "s")]
    assert result.scores == pytest.approx(expected, rel=1e-6)


def test_trailing_blanks_are_dropped_as_in_training(tokenizer: Tokenizer) -> None:
    documents, source_length, _ = encode_candidates(tokenizer, question("a:\n  ", "b \n"), ANY)
    assert tokenizer.decode(documents[0]) == "a:\n b"
    assert (source_length, documents[0][-1]) == (3, 2)


def test_branches_of_a_tree_by_hand() -> None:
    documents = [np.array(ids) for ids in ([11, 12, 5, 2], [11, 12, 7, 2], [11, 12, 5, 6, 2])]
    [tree] = grow_trees(3, documents, source_length=2, row_length=8)
    assert (tree.question, tree.candidates, tree.slots) == (3, (0, 2, 1), 5)
    assert [(piece.trunk, piece.shared) for piece in tree.pieces] == [(-1, 0), (0, 3), (0, 2)]
    assert [piece.tokens.tolist() for piece in tree.pieces] == [documents[i].tolist() for i in (0, 2, 1)]


def test_prompt_ids_changed_by_a_candidate_are_not_shared() -> None:
    # Joint encoding merged the prompt's last token into the second candidate's first.
    documents = [np.array(ids) for ids in ([11, 12, 5, 2], [11, 99, 7, 2])]
    [tree] = grow_trees(0, documents, source_length=2, row_length=8)
    assert [piece.shared for piece in tree.pieces] == [0, 1]


def test_equal_candidates_share_all_but_the_token_without_a_slot() -> None:
    [tree] = grow_trees(0, [np.array([11, 12, 5, 2])] * 2, source_length=2, row_length=8)
    assert (tree.slots, [piece.shared for piece in tree.pieces]) == (3, [0, 3])


def test_candidates_beyond_a_row_start_another_tree() -> None:
    documents = [np.array([11, 12, 13, last, 2]) for last in (5, 6, 7)]
    trees = grow_trees(0, documents, source_length=3, row_length=5)
    assert [(tree.candidates, tree.slots) for tree in trees] == [((0, 1), 5), ((2,), 4)]
    assert [piece.trunk for tree in trees for piece in tree.pieces] == [-1, 0, -1]


def test_best_fit_decreasing_by_hand() -> None:
    trees = [Tree(question, (), (), slots) for question, slots in enumerate([3, 7, 5, 4, 1])]
    rows = pack_trees(trees, row_length=10)
    # 7 opens a row; 5 another; 4 fits 5's (leaving 1); 3 fills 7's; 1 fills the other.
    assert [[tree.slots for tree in row] for row in rows] == [[7, 3], [5, 4, 1]]


def test_candidate_longer_than_the_model_is_an_error(tokenizer: Tokenizer, fake_model: Any) -> None:
    with pytest.raises(ValueError, match="q: an answer of 12 tokens leaves no room"):
        rank_all(fake_model(), tokenizer, [question("p", "0123456789")], PromptRules((), 11))
