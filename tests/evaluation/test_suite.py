"""The whole run over a bench of two tasks: scores, resumption, replicas."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_iml.data.bench.folder import Bench
from megatron_iml.evaluation.aggregate import TaskScore
from megatron_iml.evaluation.replicas import Replicas
from megatron_iml.evaluation.suite import evaluate_bench
from megatron_iml.evaluation.task import Evaluator


def run(
    bench_folder: Path, evaluator: Evaluator, output: Path, replicas: Replicas | None = None
) -> list[TaskScore]:
    return evaluate_bench(
        Bench.open(bench_folder),
        evaluator,
        output,
        replicas=replicas or Replicas(),
        console=Console(quiet=True),
    )


def written(output: Path, stem: str, key: str) -> list[Any]:
    """One field of every example of a task, from its file."""
    examples = json.loads((output / f"{stem}.json").read_text())["examples"]
    return [example[key] for example in examples]


def work_done(evaluator: Evaluator) -> tuple[int, int]:
    """Rows ranked and batches generated so far."""
    return len(evaluator.model.rows), len(evaluator.model.prefills)


def test_scores_by_hand(bench_folder: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    pick, say = run(bench_folder, evaluator, tmp_path / "tasks")
    # The answers of "pick" are a b a b a, and the model prefers "a".
    assert written(tmp_path / "tasks", "flan__cat__pick", "score") == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert pick.estimate.mean == pytest.approx(0.6)
    assert (pick.task, pick.level, pick.category) == ("pick", "fully_held_out", "cat")
    # "xy" against "x y" shares no word.
    assert written(tmp_path / "tasks", "sni__cat__say", "answer") == ["xy"] * 3
    assert say.estimate.mean == 0.0
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {
        "flan__cat__pick.json",
        "sni__cat__say.json",
    }


def test_limit_takes_the_first_examples(bench_folder: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    conditions = replace(evaluator.conditions, examples_per_task=2)
    run(bench_folder, replace(evaluator, conditions=conditions), tmp_path)
    assert written(tmp_path, "flan__cat__pick", "id") == ["p0", "p1"]
    assert written(tmp_path, "sni__cat__say", "id") == ["s0", "s1"]


def test_finished_tasks_are_read_not_run(bench_folder: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    first = run(bench_folder, evaluator, tmp_path)
    done = work_done(evaluator)
    assert run(bench_folder, evaluator, tmp_path) == first
    assert work_done(evaluator) == done


def test_a_killed_run_goes_on_with_the_missing_task(
    bench_folder: Path, evaluator: Evaluator, tmp_path: Path
) -> None:
    first = run(bench_folder, evaluator, tmp_path)
    (tmp_path / "sni__cat__say.json").unlink()
    rows, prefills = work_done(evaluator)
    assert run(bench_folder, evaluator, tmp_path) == first
    assert work_done(evaluator) == (rows, 2 * prefills)


def test_another_checkpoint_runs_everything_again(
    bench_folder: Path, evaluator: Evaluator, tmp_path: Path
) -> None:
    run(bench_folder, evaluator, tmp_path)
    rows, prefills = work_done(evaluator)
    conditions = replace(evaluator.conditions, checkpoint_fingerprint="c2")
    again = run(bench_folder, replace(evaluator, conditions=conditions), tmp_path)
    assert work_done(evaluator) == (2 * rows, 2 * prefills)
    assert run(bench_folder, replace(evaluator, conditions=conditions), tmp_path) == again


class ThreadGroup:
    """The collectives of `size` threads; a barrier before and after each exchange."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def replicas(self, rank: int) -> Replicas:
        def gather(mine: Any) -> list[Any]:
            self.slots[rank] = mine
            self.barrier.wait()
            everyone = list(self.slots)
            self.barrier.wait()
            return everyone

        return Replicas(rank, self.size, gather, lambda mine: gather(mine)[0], writes=rank == 0)


def run_replicas(
    bench_folder: Path, evaluator: Evaluator, output: Path, fake_model: Any, size: int
) -> list[list[TaskScore]]:
    """Results of every one of `size` replicas, each a thread with a model of its own."""
    group = ThreadGroup(size)
    results: list[list[TaskScore]] = [[] for _ in range(size)]

    def replica(rank: int) -> None:
        model = fake_model(evaluator.model.log_likelihood, evaluator.model.next_id)
        results[rank] = run(bench_folder, replace(evaluator, model=model), output, group.replicas(rank))

    threads = [threading.Thread(target=replica, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_together_give_the_results_of_one(
    bench_folder: Path, evaluator: Evaluator, tmp_path: Path, fake_model: Any, size: int
) -> None:
    alone = run(bench_folder, evaluator, tmp_path / "alone")
    shared = tmp_path / "shared"
    assert run_replicas(bench_folder, evaluator, shared, fake_model, size) == [alone] * size
    # Only the writer looks at the folder: the others learn from it what is done.
    (shared / "sni__cat__say.json").unlink()
    assert run_replicas(bench_folder, evaluator, shared, fake_model, size) == [alone] * size


def test_empty_split_is_an_error(bench_folder: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    conditions = replace(evaluator.conditions, split="validation")
    with pytest.raises(ValueError, match="has no file in the split validation; choose another"):
        run(bench_folder, replace(evaluator, conditions=conditions), tmp_path)


def test_a_bad_row_is_found_before_any_work(bench_folder: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    manifest = bench_folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rouge_l"', b'"accuracy"'))
    with pytest.raises(ValueError, match="sni__cat__say.jsonl, example s0: accuracy needs a candidate"):
        run(bench_folder, evaluator, tmp_path)
    assert work_done(evaluator) == (0, 0)
