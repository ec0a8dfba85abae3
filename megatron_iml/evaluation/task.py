"""One task: from its questions to example scores.

What enters: the questions of a bench file. What leaves: an `ExampleScore` each. The task's metric decides
how: accuracy ranks the candidates, exact match and Rouge-L generate an answer and compare it with the
references.

    {"id": "7", "src": "2 > 1?\\nA:", "tgt": "Yes", "candidates": ["No", "Yes"]}
    by accuracy, with log-likelihoods -3.1 and -0.7:
    ExampleScore("7", score=1.0, answer="Yes", references=("Yes",), candidate_scores=(-3.1, -0.7), ...)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.data.example import Metric
from megatron_iml.evaluation.conditions import Conditions
from megatron_iml.evaluation.generation import generate
from megatron_iml.evaluation.language_model import LanguageModel
from megatron_iml.evaluation.metrics import accuracy, exact_match, rouge_l
from megatron_iml.evaluation.prompts import PromptRules, prompt_rules
from megatron_iml.evaluation.question import Question
from megatron_iml.evaluation.ranking import rank

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Passes rows or batches of work through, e.g. drawing a progress bar."""


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example's answer and score; `candidate_scores` is empty for generated answers.

    `cut_tokens` is what the prompt lost on the left; `finished` is False for an answer that hit the limit.
    """

    id: str
    score: float
    answer: str
    references: tuple[str, ...]
    candidate_scores: tuple[float, ...]
    cut_tokens: int
    finished: bool


@dataclass(frozen=True)
class Evaluator:
    """What is the same for every task: a model with its tokenizer, and how it is asked.

    `row_length` is the slots of a packed row, `batch_size` the prompts decoded together; neither changes
    scores.
    """

    # Of any cache: this only hands the model on to `rank` and `generate`.
    model: LanguageModel[Any]
    tokenizer: Tokenizer
    conditions: Conditions
    row_length: int
    batch_size: int

    @property
    def rules(self) -> PromptRules:
        """How a question becomes a prompt."""
        conditions = self.conditions
        # From the conditions and not from the config: what the report says is what was done.
        return prompt_rules(conditions.inference_prefix, self.tokenizer.eos_id, conditions.max_positions)


def score_questions(
    evaluator: Evaluator, questions: Sequence[Question], metric: Metric, track: Track
) -> list[ExampleScore]:
    """Answer and score questions, in their order."""
    # The metric alone decides: exact match and Rouge-L ignore candidates even where a row has them.
    if metric == "accuracy":
        return _score_rankings(evaluator, questions, track)
    return _score_generations(
        evaluator, questions, exact_match if metric == "exact_match" else rouge_l, track
    )


def _score_rankings(evaluator: Evaluator, questions: Sequence[Question], track: Track) -> list[ExampleScore]:
    conditions = evaluator.conditions
    rankings = rank(
        evaluator.model,
        evaluator.tokenizer,
        questions,
        rules=evaluator.rules,
        row_length=evaluator.row_length,
        scoring=conditions.scoring,
        track=track,
    )
    return [
        ExampleScore(
            id=question.id,
            # Any right candidate counts, where a row has several references among them.
            score=accuracy(ranking.scores, question.correct),
            # The first of equals: a tie scores 0 all the same, since accuracy wants strictly more.
            answer=question.candidates[max(range(len(ranking.scores)), key=ranking.scores.__getitem__)],
            references=question.references,
            candidate_scores=ranking.scores,
            cut_tokens=ranking.cut_tokens,
            # Ranking generates nothing that could hit a limit.
            finished=True,
        )
        for question, ranking in zip(questions, rankings, strict=True)
    ]


def _score_generations(
    evaluator: Evaluator,
    questions: Sequence[Question],
    compare: Callable[[str, Sequence[str]], float],
    track: Track,
) -> list[ExampleScore]:
    conditions = evaluator.conditions
    generations = generate(
        evaluator.model,
        evaluator.tokenizer,
        questions,
        rules=evaluator.rules,
        max_new_tokens=conditions.max_new_tokens,
        batch_size=evaluator.batch_size,
        track=track,
    )
    return [
        ExampleScore(
            id=question.id,
            score=compare(generation.text, question.references),
            # What a reader sees; the metrics strip by themselves.
            answer=generation.text.strip(),
            references=question.references,
            candidate_scores=(),
            cut_tokens=generation.cut_tokens,
            finished=generation.finished,
        )
        for question, generation in zip(questions, generations, strict=True)
    ]
