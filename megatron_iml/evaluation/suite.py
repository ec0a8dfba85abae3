"""Runs the bench files of a split through a model, one after the other.

What enters: a bench and an evaluator. What leaves: one `TaskScore` per file, in the manifest's order.
Its examples are written as soon as they are there; a later run with equal conditions skips it.

    run 1, killed in the third of 35 tasks    -> tasks/a.json, tasks/b.json
    run 2, same checkpoint, bench, conditions -> reads these two, runs the other 33
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_iml.data.bench.folder import Bench
from megatron_iml.data.example import Metric
from megatron_iml.evaluation.aggregate import TaskScore
from megatron_iml.evaluation.conditions import task_fingerprint
from megatron_iml.evaluation.question import Question, read_questions
from megatron_iml.evaluation.replicas import Replicas, merge, shard
from megatron_iml.evaluation.results import TaskResult, read_scores, summarise, write_result
from megatron_iml.evaluation.task import Evaluator, ExampleScore, Track, score_questions


def evaluate_bench(
    bench: Bench, evaluator: Evaluator, folder: Path, *, replicas: Replicas, console: Console
) -> list[TaskScore]:
    """Scores of all files of the split; those in `folder` are used where their fingerprint is the same.

    Every process of the job calls this with the same arguments but for `replicas`; all receive all scores.

    Raises ValueError if the split has no file or a row does not fit its task's metric, before any work.
    """
    conditions = evaluator.conditions
    files = bench.files(conditions.split)
    if not files:
        raise ValueError(
            f"{bench.folder} has no file in the split {conditions.split}; choose another evaluation.split, "
            "or rebuild the bench with held-out examples"
        )
    # All of them before any model work: a bad row in the last file is found in the first minute. Read again
    # when its turn comes, since the questions of a whole bench do not fit in memory.
    for file in files:
        read_questions(bench, file, conditions.examples_per_task)
    fingerprints = {file.stem: task_fingerprint(conditions, file.sha256, file.metric) for file in files}
    # Read before the first task and by one process, so that all processes skip the same tasks.
    scores = dict(replicas.broadcast(read_scores(folder, fingerprints) if replicas.writes else {}))
    with _progress(console, visible=replicas.writes) as progress:
        tasks_bar = progress.add_task("tasks", total=len(files), completed=len(scores))
        work_bar = progress.add_task("")
        # The same list on every process, in the same order: each file is a gather of all.
        for file in [file for file in files if file.stem not in scores]:
            progress.reset(work_bar, description=file.task)
            track = partial(progress.track, task_id=work_bar)
            questions = read_questions(bench, file, conditions.examples_per_task)
            examples = _score_shared(evaluator, questions, file.metric, replicas, track)
            # On every process, from the same examples: the report needs all scores on whoever writes it.
            scores[file.stem] = summarise(file, examples)
            if replicas.writes:
                result = TaskResult(fingerprints[file.stem], scores[file.stem], examples)
                write_result(folder, file.stem, result)
            progress.advance(tasks_bar)
    return [scores[file.stem] for file in files]


def _score_shared(
    evaluator: Evaluator, questions: Sequence[Question], metric: Metric, replicas: Replicas, track: Track
) -> tuple[ExampleScore, ...]:
    """Scores of all questions, each answered by one replica."""
    # May be none of them, where a file has fewer examples than there are replicas.
    mine = shard(questions, replicas.rank, replicas.size)
    return tuple(merge(replicas.gather(score_questions(evaluator, mine, metric, track))))


def _progress(console: Console, *, visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        # Bars of several ranks would draw over one another.
        disable=not visible,
    )
