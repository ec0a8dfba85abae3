"""Scores of single examples, each in [0, 1].

What enters: a prediction and its references (text), or candidate scores and which candidates are right.
What leaves: one float. A task's score is the mean over its examples (`aggregate.py`).

    exact_match(" The Yes. ", ["the yes"])                    1.0
    rouge_l("the cat sat", ["the cat sat on the mat"])        0.6667   precision 3/3, recall 3/6
    accuracy([-1.0, -2.0, -1.5], correct=[0])                 1.0
    accuracy([-1.0, -1.0], correct=[0])                       0.0      a tie is not a win
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def normalise_answer(text: str) -> str:
    """Lower-case, collapse every run of white space to one space, strip, drop one full stop at the end.

    Punctuation stays, unlike in SQuAD's normalisation: answers such as ")" or "-3" consist of it, and without
    it "]" would match ")".
    """
    collapsed = " ".join(text.lower().split())
    return collapsed.removesuffix(".").rstrip()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised reference, else 0.0."""
    assert references, "exact match needs at least one reference, got 0"
    return float(normalise_answer(prediction) in {normalise_answer(reference) for reference in references})


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F1 with Porter stemming, the largest over the references, as Super-NaturalInstructions does.

    The tokens are rouge-score's: runs of ASCII letters and digits. Text without any scores 0.0.
    """
    assert references, "Rouge-L needs at least one reference, got 0"
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


# Once: it builds a stemmer, and a task asks thousands of times.
@cache
def _rouge_scorer() -> "RougeScorer":
    # Here and not at the top: nltk takes 0.4 s to import, and ranking does without it.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def accuracy(scores: Sequence[float], correct: Collection[int]) -> float:
    """1.0 if some correct candidate scores strictly higher than every wrong one, else 0.0.

    Strict, as in metaseq's validation: a model that gives all candidates the same score earns nothing.
    A NaN score never wins. Without wrong candidates the answer is 1.0.
    """
    assert correct, f"ranking {len(scores)} candidates needs at least one correct one, got 0"
    wrong = [score for index, score in enumerate(scores) if index not in correct]
    # Any right candidate will do, but it has to beat every wrong one; comparisons with NaN are false.
    return float(any(all(scores[index] > other for other in wrong) for index in correct))
