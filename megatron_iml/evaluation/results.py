"""Results of a task on disk, so that an evaluation that was interrupted goes on where it stopped.

What enters: example scores of a bench file. What leaves: `<folder>/<file>.json`, written when the task is
done; its score is read back if its fingerprint (checkpoint, tokenizer, file content, conditions) is still the
same.

    {"fingerprint": "3f9a...",
     "score": {"task": "copa", "benchmark": "flan", ..., "estimate": {"mean": 0.5, ...}},
     "examples": [{"id": "7", "score": 1.0, "answer": "Yes", "references": ["Yes"], ...}, ...]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from megatron_iml.data.bench.folder import BenchFile
from megatron_iml.data.files import write_atomically
from megatron_iml.evaluation.aggregate import Estimate, TaskScore, estimate_examples
from megatron_iml.evaluation.task import ExampleScore


@dataclass(frozen=True)
class TaskResult:
    """A task's score and the examples behind it; `fingerprint` names the conditions that gave them."""

    fingerprint: str
    score: TaskScore
    examples: tuple[ExampleScore, ...]


def summarise(file: BenchFile, examples: Sequence[ExampleScore]) -> TaskScore:
    """A task's score: the mean over its examples, and how many of them were cut or did not finish."""
    return TaskScore(
        task=file.task,
        benchmark=file.benchmark,
        category=file.category,
        level=file.level,
        metric=file.metric,
        estimate=estimate_examples([example.score for example in examples]),
        # Counted, since a low score of a task whose prompts were cut says little of the model.
        cut_prompts=sum(example.cut_tokens > 0 for example in examples),
        unfinished_answers=sum(not example.finished for example in examples),
        parent=file.parent,
    )


def write_result(folder: Path, stem: str, result: TaskResult) -> None:
    """Write the result of the bench file `stem`; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or absent: a kill in the middle must not leave a score that is read back.
    write_atomically(folder / f"{stem}.json", orjson.dumps(asdict(result)))


def read_scores(folder: Path, fingerprints: Mapping[str, str]) -> dict[str, TaskScore]:
    """Scores that are there, by stem, of those asked for; only ones whose fingerprint is the given one."""
    # Only of files asked for: the folder may hold tasks of an older bench.
    paths = {stem: folder / f"{stem}.json" for stem in fingerprints}
    found = {stem: orjson.loads(path.read_bytes()) for stem, path in paths.items() if path.is_file()}
    # The examples stay in their files: those of 1,500 tasks are more than a machine's memory.
    return {
        stem: TaskScore(**{**content["score"], "estimate": Estimate(**content["score"]["estimate"])})
        for stem, content in found.items()
        # Others stay on disk until they are written over.
        if content["fingerprint"] == fingerprints[stem]
    }
