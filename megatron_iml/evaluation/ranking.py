"""Rank classification: which candidate does the model find most likely after the prompt?

What enters: prompts with their candidates. What leaves: one score per candidate, the sum (or mean) of the
log-likelihoods of its tokens, `</s>` included. Each question is a prefix tree: the first candidate's
document is the trunk, every other candidate branches off where its ids differ, so the prompt is computed
once. Many trees share a row; the row's `end` array keeps them apart.

    prompt [11, 12], candidates [5, 2], [5, 6, 2], [7, 2]   (2 = </s>)
    trunk  11 12 5      targets 5 2        branches, longest shared prefix first:
    branch (11 12 5) 6  targets 5 6 2      shares 3 tokens, stores one
    branch (11 12)  7   targets 7 2        shares 2 tokens, stores one
    5 slots instead of 3 + 4 + 3 = 10

Prompt and candidate are encoded jointly, as in training. Where that changes the prompt's last ids, the
candidate branches off before them; the shared prefix is always that of the ids, so scores equal those of
one document per candidate. Shape letters: T = tokens, M = targets of a row.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.evaluation.language_model import LanguageModel
from megatron_iml.evaluation.prompts import PromptRules, fit_prompt
from megatron_iml.evaluation.question import Question

Scoring = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of a question's candidates, in their order, and the prompt tokens cut on the left."""

    scores: tuple[float, ...]
    cut_tokens: int


@dataclass(frozen=True, slots=True)
class Tree:
    """Candidates of one question that share a trunk; `pieces[i]` is the document of `candidates[i]`."""

    question: int
    candidates: tuple[int, ...]
    pieces: tuple[Piece, ...]
    slots: int


def rank(
    model: LanguageModel[Any],
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    rules: PromptRules,
    row_length: int,
    scoring: Scoring,
    track: Callable[[Sequence[list[Tree]]], Iterable[list[Tree]]],
) -> list[Ranking]:
    """Score all candidates of all questions.

    Args:
        model: anything with `target_losses`.
        tokenizer: the checkpoint's.
        questions: each with at least one candidate.
        rules: prefix and the longest document in positions.
        row_length: slots of a packed row.
        scoring: sum or mean of the candidate's token log-likelihoods.
        track: passes rows through, e.g. drawing a progress bar.

    Raises:
        ValueError: a candidate leaves no room for its prompt.
    """
    assert rules.max_positions <= row_length, (
        f"documents of {rules.max_positions} positions do not fit rows of {row_length}"
    )
    trees: list[Tree] = []
    cut_tokens: list[int] = []
    # All questions before the first row: the more trees, the fuller the rows.
    for index, question in enumerate(questions):
        documents, source_length, cut = encode_candidates(tokenizer, question, rules)
        trees.extend(grow_trees(index, documents, source_length, row_length))
        cut_tokens.append(cut)
    # NaN and not 0: a candidate that no row scored must never win.
    scores = [[float("nan")] * len(question.candidates) for question in questions]
    for number, row in enumerate(track(pack_trees(trees, row_length))):
        for tree, candidate, score in _score_row(model, row, row_length, number, scoring):
            scores[tree.question][candidate] = score
    return [Ranking(tuple(row), cut) for row, cut in zip(scores, cut_tokens, strict=True)]


def encode_candidates(
    tokenizer: Tokenizer, question: Question, rules: PromptRules
) -> tuple[list[np.ndarray], int, int]:
    """One document (int32 [T], prefix to `</s>`) per candidate, the index of its first target, tokens cut.

    All candidates keep the same part of the prompt: what is left beside the longest of them.
    """
    # As `data/corpus/encoding.py` joins the two: one space between, which the answer's first token takes in.
    source = question.prompt.rstrip(" ")
    texts = [source, *(f"{source} {candidate.rstrip()}" for candidate in question.candidates)]
    # One batch: the source alone only says where it ends, and its own ids are not used.
    source_T, *joint = tokenizer.encode_batch(texts)
    length = len(source_T)
    # A boundary that merges tokens could make the joint ids shorter than the source: no target would be left.
    shortest = min(len(ids_T) for ids_T in joint)
    assert shortest >= length, (
        f"{question.id}: a candidate shortened its prompt from {length} tokens to {shortest}"
    )
    # The longest decides for all: scores of other contexts could not be compared.
    answer_tokens = max(len(ids_T) for ids_T in joint) - length + 1
    documents = []
    for ids_T in joint:
        prompt_T, cut = fit_prompt(ids_T[:length], answer_tokens, rules, question.id)
        # [prefix, prompt, answer, </s>]: the same for all candidates up to the answer, unless ids merged.
        documents.append(np.concatenate([prompt_T, ids_T[length:], [tokenizer.eos_id]]).astype(np.int32))
    return documents, len(prompt_T), cut


def grow_trees(
    question: int, documents: Sequence[np.ndarray], source_length: int, row_length: int
) -> list[Tree]:
    """Hang candidates on a trunk until the row is full; the next candidate then starts another tree."""
    trees = []
    members: list[tuple[int, int]] = []  # (candidate, shared tokens); the trunk, sharing none, is first
    slots = 0
    for candidate, document_T in enumerate(documents):
        shared = _shared_prefix(documents[members[0][0]], document_T) if members else 0
        # L tokens take L - 1 slots, less what they share. A trunk always fits: `fit_prompt` has cut it.
        if members and slots + len(document_T) - 1 - shared > row_length:
            trees.append(_tree(question, members, documents, source_length, slots))
            # The prompt is then stored once more, as the trunk of the next tree.
            members, slots, shared = [], 0, 0
        members.append((candidate, shared))
        slots += len(document_T) - 1 - shared
    trees.append(_tree(question, members, documents, source_length, slots))
    return trees


def pack_trees(trees: Iterable[Tree], row_length: int) -> list[list[Tree]]:
    """Best-fit decreasing: the largest tree first, each into the fullest row that still takes it."""
    rows: list[list[Tree]] = []
    free: list[tuple[int, int]] = []  # (free slots, row), sorted
    # Stable: equal trees keep the order of their questions, so rows are the same in every run.
    for tree in sorted(trees, key=lambda tree: -tree.slots):
        # The smallest space that is large enough; -1 sorts before every row number.
        at = bisect_left(free, (tree.slots, -1))
        if at == len(free):
            rows.append([])
            space, row = row_length, len(rows) - 1
        else:
            space, row = free.pop(at)
        rows[row].append(tree)
        insort(free, (space - tree.slots, row))
    return rows


def _tree(
    question: int,
    members: Sequence[tuple[int, int]],
    documents: Sequence[np.ndarray],
    source_length: int,
    slots: int,
) -> Tree:
    # Longer shared prefixes first: a trunk token's descendants must be contiguous, since `end` is one number.
    ordered = [members[0], *sorted(members[1:], key=lambda member: -member[1])]
    pieces = tuple(
        Piece(
            tokens=documents[candidate],
            # Of every document alike: targets begin at one index, even where shared tokens reach beyond it.
            source_length=source_length,
            # Within the tree; `_score_row` adds where the tree begins in its row.
            trunk=-1 if position == 0 else 0,
            shared=shared,
        )
        for position, (candidate, shared) in enumerate(ordered)
    )
    return Tree(question, tuple(candidate for candidate, _ in ordered), pieces, slots)


def _shared_prefix(trunk_T: np.ndarray, branch_T: np.ndarray) -> int:
    """Tokens in common from the left, without the last of either: that one has no slot."""
    length = min(len(trunk_T), len(branch_T)) - 1
    differs = np.flatnonzero(trunk_T[:length] != branch_T[:length])
    return int(differs[0]) if len(differs) else length


def _score_row(
    model: LanguageModel[Any], trees: Sequence[Tree], row_length: int, number: int, scoring: Scoring
) -> Iterable[tuple[Tree, int, float]]:
    pieces: list[Piece] = []
    owners: list[tuple[Tree, int]] = []
    for tree in trees:
        base = len(pieces)
        # In the order of pieces, which is that of `assemble_row`'s targets.
        owners.extend((tree, candidate) for candidate in tree.candidates)
        # Within a tree 0 is the trunk; in a row the trunk's index is where its tree begins.
        pieces.extend(replace(piece, trunk=base) if piece.trunk == 0 else piece for piece in tree.pieces)
    # In double precision, so that the sum does not depend on the order of a long candidate.
    losses_M = model.target_losses(assemble_row(pieces, row_length, number)).astype(np.float64)
    # A branch's targets include those that it shares with the trunk: each candidate has its whole answer.
    counts = [len(piece.tokens) - piece.source_length for piece in pieces]
    assert len(losses_M) == sum(counts), f"row {number} has {sum(counts)} targets, got {len(losses_M)} losses"
    reduce = np.sum if scoring == "sum" else np.mean
    for (tree, candidate), part in zip(owners, np.split(losses_M, np.cumsum(counts)[:-1]), strict=True):
        yield tree, candidate, -float(reduce(part))
