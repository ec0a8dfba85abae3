"""Task results on disk: what is written is what is read, and only under the same fingerprint."""

import json
from pathlib import Path

from megatron_iml.data.bench.folder import BenchFile
from megatron_iml.evaluation.aggregate import Estimate, TaskScore
from megatron_iml.evaluation.results import TaskResult, read_scores, summarise, write_result
from megatron_iml.evaluation.task import ExampleScore

FILE = BenchFile(
    "copa", "flan", "Cause Effect", "fully_held_out", "test", 4, "accuracy", "f1", "test/x.jsonl"
)
EXAMPLES = (
    ExampleScore("1", 1.0, "a\u2028b", ("a", "b"), (-0.1, -2.0), 0, True),
    ExampleScore("2", 0.0, "", ("a",), (), 7, False),
)


def test_summary_by_hand() -> None:
    assert summarise(FILE, EXAMPLES) == TaskScore(
        "copa", "flan", "Cause Effect", "fully_held_out", "accuracy", Estimate(0.5, 0.5, 2), 1, 1
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    result = TaskResult("3f", summarise(FILE, EXAMPLES), EXAMPLES)
    write_result(tmp_path / "tasks", FILE.stem, result)
    assert read_scores(tmp_path / "tasks", {FILE.stem: "3f"}) == {FILE.stem: result.score}
    written = json.loads((tmp_path / "tasks" / f"{FILE.stem}.json").read_text())["examples"]
    assert [list(example.values()) for example in written] == [
        ["1", 1.0, "a\u2028b", ["a", "b"], [-0.1, -2.0], 0, True],
        ["2", 0.0, "", ["a"], [], 7, False],
    ]


def test_other_fingerprint_or_missing_file_is_no_result(tmp_path: Path) -> None:
    write_result(tmp_path, "a", TaskResult("3f", summarise(FILE, EXAMPLES), EXAMPLES))
    assert read_scores(tmp_path, {"a": "40", "b": "3f"}) == {}
    assert read_scores(tmp_path / "absent", {"a": "3f"}) == {}
