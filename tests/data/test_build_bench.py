"""The command line: what a user sees, and the two examples that come with the project."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_iml.data.bench import verify_bench
from megatron_iml.data.bench_config import load_bench_config
from megatron_iml.data.ledger import Drops
from megatron_iml.data.levels import levels_of

ROOT = Path(__file__).parents[2]
DEVSET = ROOT.parent / "shared" / "devset"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "preprocess" / "build_bench.py", *map(str, arguments)]
    environment = {"PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def small_config(folder: Path) -> Path:
    (folder / "B__C__t.jsonl").write_text("".join(f'{{"src": "q{i}", "tgt": "a"}}\n' for i in range(20)))
    (folder / "B__D__u.jsonl").write_text('{"src": "q", "tgt": "a"}\n{"src": "q", "tgt": " "}\n')
    (folder / "splits.yaml").write_text("held_out_categories: [D]\n")
    path = folder / "bench.yaml"
    path.write_text("sources: [{reader: source_target, folder: .}]\nsplits: splits.yaml\n")
    return path


def test_a_bench_is_built_and_summed_up(tmp_path):
    result = run("--config", small_config(tmp_path), "--output", tmp_path / "bench")
    assert result.returncode == 0, result.stderr
    assert "read 22 instances of 2 tasks; dropped 1" in result.stdout
    assert "1 blank target" in result.stdout
    assert [(entry.file, entry.examples) for entry in verify_bench(tmp_path / "bench").entries] == [
        ("train/B__C__t.jsonl", 16),
        ("validation/B__C__t.jsonl", 2),
        ("test/B__C__t.jsonl", 2),
        ("test/B__D__u.jsonl", 1),
    ]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    config = small_config(tmp_path)
    (tmp_path / "splits.yaml").write_text("held_out_tasks: [tt]\n")
    for arguments, message in (
        (["--config", config, "--output", tmp_path / "bench"], "error: splits: no task 'tt' in the sources"),
        (["--config", tmp_path / "absent.yaml", "--output", tmp_path / "bench"], "error: no file "),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "bench").exists()


def test_help_is_quick():
    start = time.perf_counter()
    result = run("--help")
    assert result.returncode == 0
    assert "--source-root" in result.stdout
    assert time.perf_counter() - start < 1.0


def test_demo_example_holds_out_two_categories_and_four_tasks():
    pytest.importorskip("reasoning_gym", reason="needs the demo extra")
    config = load_bench_config(ROOT / "examples" / "demo" / "bench.yaml")
    tasks = config.tasks(Drops())
    levels_of(config.splits, tasks)
    assert len(tasks) >= 40
    assert len({task.category for task in tasks} - set(config.splits.held_out_categories)) >= 8
    assert (len(config.splits.held_out_categories), len(config.splits.held_out_tasks)) == (2, 4)


def test_real_example_builds_from_the_real_sample(tmp_path):
    if not DEVSET.is_dir():
        pytest.skip("the real sample ../shared/devset is absent")
    output = tmp_path / "bench"
    result = run("--config", ROOT / "examples/real/bench.yaml", "--source-root", DEVSET, "--output", output)
    assert result.returncode == 0, result.stderr
    bench = verify_bench(output)
    levels = {entry.level: {each.task for each in bench.files(level=entry.level)} for entry in bench.entries}
    assert {level: len(tasks) for level, tasks in levels.items()} == {
        "fully_held_out": 4,
        "partially_supervised": 6,
        "fully_supervised": 76,
    }
    ledger = bench.ledger()["tasks"]
    assert sum(counts["read"] for counts in ledger.values()) == 24_170
    by_task = {entry.task: entry for entry in bench.files("test")}
    # Two U+2028 stand in a question of GSM8K; every line of the file is one instance all the same.
    assert ledger[by_task["gsm8k_train"].stem]["read"] == (
        (DEVSET / "grade-school-math/grade_school_math/data/train.jsonl").read_bytes().count(b"\n")
    )
    references = [len(row.get("references", [row["tgt"]])) for e in bench.entries for row in bench.rows(e)]
    assert max(references) > 10
    assert not any("<<" in row["tgt"] for row in bench.rows(by_task["gsm8k_train"]))
