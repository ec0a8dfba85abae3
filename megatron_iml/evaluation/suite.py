"""Runs the bench files of a split through a model, one after the other.

What enters: a bench and an evaluator. What leaves: one `TaskResult` per file, in the manifest's order.
Each is written as soon as it is there; a later run with equal conditions skips it.

    run 1, killed in the third of 35 tasks    -> tasks/a.json, tasks/b.json
    run 2, same checkpoint, bench, conditions -> reads these two, runs the other 33
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_iml.data.bench import Bench
from megatron_iml.data.example import Metric
from megatron_iml.evaluation.conditions import task_fingerprint
from megatron_iml.evaluation.question import Question, read_questions
from megatron_iml.evaluation.replicas import Replicas, merge, shard
from megatron_iml.evaluation.results import TaskResult, read_results, summarise, write_result
from megatron_iml.evaluation.task import Evaluator, ExampleScore, Track, score_questions


def evaluate_bench(
    bench: Bench, evaluator: Evaluator, folder: Path, *, replicas: Replicas, console: Console
) -> list[TaskResult]:
    """Results of all files of the split; those in `folder` are used where their fingerprint is the same.

    Every process of the job calls this with the same arguments but for `replicas`; all receive all results.

    Raises ValueError if the split has no file or a row does not fit its task's metric, before any work.
    """
    conditions = evaluator.conditions
    files = bench.files(conditions.split)
    if not files:
        raise ValueError(
            f"{bench.folder} has no file in the split {conditions.split}; choose another evaluation.split, "
            "or rebuild the bench with held-out examples"
        )
    # All of them before any model work: a bad row in the last file is found in the first minute.
    questions = {file.stem: read_questions(bench, file, conditions.examples_per_task) for file in files}
    fingerprints = {file.stem: task_fingerprint(conditions, file.sha256, file.metric) for file in files}
    # Read before the first task and by one process, so that all processes skip the same tasks.
    results = dict(replicas.broadcast(read_results(folder, fingerprints) if replicas.writes else {}))
    with _progress(console, visible=replicas.writes) as progress:
        tasks_bar = progress.add_task("tasks", total=len(files), completed=len(results))
        work_bar = progress.add_task("")
        for file in [file for file in files if file.stem not in results]:
            progress.reset(work_bar, description=file.task)
            track = partial(progress.track, task_id=work_bar)
            examples = _score_shared(evaluator, questions[file.stem], file.metric, replicas, track)
            result = TaskResult(fingerprints[file.stem], summarise(file, examples), examples)
            if replicas.writes:
                write_result(folder, file.stem, result)
            results[file.stem] = result
            progress.advance(tasks_bar)
    return [results[file.stem] for file in files]


def _score_shared(
    evaluator: Evaluator, questions: Sequence[Question], metric: Metric, replicas: Replicas, track: Track
) -> tuple[ExampleScore, ...]:
    """Scores of all questions, each answered by one replica."""
    mine = shard(questions, replicas.rank, replicas.size)
    return tuple(merge(replicas.gather(score_questions(evaluator, mine, metric, track))))


def _progress(console: Console, *, visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not visible,
    )
