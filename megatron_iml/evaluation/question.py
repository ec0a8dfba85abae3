"""One example as evaluation sees it, made from a row of a bench file.

What enters: a row {"id", "src", "tgt"[, "references"][, "candidates"]} and the metric of its task. What
leaves: a `Question`, checked.

    {"id": "7", "src": "2 > 1?\\nA:", "tgt": "Yes", "candidates": ["No", "Yes"]}, accuracy
    -> Question("7", prompt="2 > 1?\\nA:", references=("Yes",), candidates=("No", "Yes")); correct = {1}
"""

from dataclasses import dataclass
from itertools import islice

from megatron_iml.data.bench.folder import Bench, BenchFile, BenchRow
from megatron_iml.data.example import Metric


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its references, and the candidates to rank; without candidates the answer is generated."""

    id: str
    prompt: str
    references: tuple[str, ...]
    candidates: tuple[str, ...] = ()

    @property
    def correct(self) -> frozenset[int]:
        """Indices of the candidates that are references; white space around them does not count."""
        right = {reference.strip() for reference in self.references}
        return frozenset(i for i, candidate in enumerate(self.candidates) if candidate.strip() in right)


def read_questions(bench: Bench, file: BenchFile, limit: int) -> list[Question]:
    """The first `limit` questions of a bench file, all for 0.

    Raises ValueError for a row that does not fit the task's metric.
    """
    # The first and no draw: the same ones in every run, and a higher limit scores these and more.
    rows = islice(bench.rows(file), limit or None)
    return [question_from_row(row, file.metric, file.file) for row in rows]


def question_from_row(row: BenchRow, metric: Metric, file: str) -> Question:
    """A row's question. Accuracy ranks its candidates; the other metrics generate, candidates or not.

    Raises ValueError if accuracy is asked for and no candidate equals a reference.
    """
    question = Question(
        id=row["id"],
        prompt=row["src"],
        # `references` holds `tgt` as well; the writer leaves it out where there is only one.
        references=tuple(row.get("references", [row["tgt"]])),
        # A generated answer is judged by its text, so its candidates are no part of the question.
        candidates=tuple(row.get("candidates", [])) if metric == "accuracy" else (),
    )
    if metric == "accuracy" and not question.correct:
        raise ValueError(
            f"{file}, example {question.id}: accuracy needs a candidate that equals a reference, got "
            f"candidates {list(question.candidates)} and references {list(question.references)}; "
            "rebuild the bench"
        )
    return question
