"""The command line: what a user sees, and the two examples that come with the project."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from readers import write_files

from megatron_iml.data.bench.config import load_bench_config
from megatron_iml.data.bench.folder import verify_bench
from megatron_iml.data.bench.levels import levels_of
from megatron_iml.data.ledger import Drops

ROOT = Path(__file__).parents[2]
DEVSET = ROOT.parent / "shared" / "devset"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "preprocess" / "build_bench.py", *map(str, arguments)]
    environment = {"PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def small_config(folder: Path) -> Path:
    (folder / "B__C__t.jsonl").write_text("".join(f'{{"src": "q{i}", "tgt": "a"}}\n' for i in range(20)))
    (folder / "B__D__u.jsonl").write_text('{"src": "q", "tgt": "a"}\n{"src": "q", "tgt": " "}\n')
    (folder / "B__C__empty.jsonl").touch()
    (folder / "splits.yaml").write_text("held_out_categories: [D, E]\nmissing_names: allow\n")
    path = folder / "bench.yaml"
    path.write_text("sources: [{reader: source_target, folder: .}]\nsplits: splits.yaml\n")
    return path


def test_a_bench_is_built_and_summed_up(tmp_path):
    result = run("--config", small_config(tmp_path), "--output", tmp_path / "bench")
    assert result.returncode == 0, result.stderr
    assert "read 22 instances of 2 tasks; dropped 1" in result.stdout
    assert "1 blank target" in result.stdout
    assert "splits: the sources hold no category E\n" in result.stderr
    assert "passed over, empty file: B__C__empty.jsonl\n" in result.stdout
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


def devset_root(folder: Path) -> Path:
    """The real sample as the example's config wants it, with what it lacks: rows for FLAN, files of T5."""
    folder.mkdir()
    for path in DEVSET.iterdir():
        if path.is_dir() and path.name != "FLAN":
            (folder / path.name).symlink_to(path)
    (folder / "FLAN/flan").mkdir(parents=True)
    (folder / "FLAN/flan/v2").symlink_to(DEVSET / "FLAN/flan/v2")
    patterns = json.loads((DEVSET / "FLAN/flan/templates.json").read_text())
    (folder / "FLAN/flan/templates.py").write_text(f"PATTERNS = {patterns!r}\n")
    parallel = [DEVSET / "e-SNLI/dataset/eSNLI" / name for name in ("s1.dev", "s2.dev", "labels.dev")]
    numbers = {"entailment": 0, "neutral": 1, "contradiction": 2}
    rows = [
        {"premise": premise, "hypothesis": hypothesis, "label": numbers[label]}
        for premise, hypothesis, label in zip(
            *(path.read_text().splitlines() for path in parallel), strict=True
        )
    ]
    graphs = json.loads((DEVSET / "dart/data/v1.1.1/dart-v1.1.1-full-dev.json").read_text())
    described = [
        {
            "tripleset": "; ".join(", ".join(triple) for triple in graph["tripleset"]),
            "target": graph["annotations"][0]["text"],
        }
        for graph in graphs
    ]
    write_files(
        folder,
        {
            "flan_rows/snli.jsonl": rows,
            "flan_rows/dart.jsonl": described,
            "T5/wmt16_enro_v003/train.jsonl": [
                {"translation": {"en": f"I have {i} hats.", "ro": f"Am {i} palarii."}} for i in range(40)
            ],
        },
    )
    return folder


@pytest.mark.skipif(not DEVSET.is_dir(), reason="the real sample ../shared/devset is absent")
def test_the_real_sample_becomes_one_bench_of_all_eight_benchmarks(tmp_path):
    output = tmp_path / "bench"
    root = devset_root(tmp_path / "root")
    result = run("--config", ROOT / "examples/real/bench.yaml", "--source-root", root, "--output", output)
    assert result.returncode == 0, result.stderr
    bench = verify_bench(output)
    ledger = bench.ledger()["tasks"]
    tasks = {(entry.benchmark, entry.task): entry.category for entry in bench.entries}
    by_benchmark = Counter(benchmark for benchmark, _ in tasks)
    assert by_benchmark == {
        "NIV2": 73,
        "PromptSource": 31,
        "CrossFit": 5,
        "FLAN": 2,
        "ExMix": 3,
        "T5": 1,
        "UnifiedSKG": 4,
        "Reasoning": 12,
        "Instructions": 1,
        "BBH": 10,
    }
    assert len(set(tasks.values())) == 42
    levels = {entry.stem: entry.level for entry in bench.entries}
    assert Counter(levels.values()) == {
        "fully_held_out": 8,
        "partially_supervised": 20,
        "fully_supervised": 114,
    }
    assert sum(counts["read"] for counts in ledger.values()) == 51_676
    # SNLI is evaluated, so neither e-SNLI nor five tasks of Super-NaturalInstructions are trained on.
    gone = {name: counts["dropped"] for name, counts in ledger.items() if not counts["written"]}
    assert {reason for dropped in gone.values() for reason in dropped} == {
        "shares a data source with a held-out task"
    }
    assert sorted(sum(dropped.values()) for dropped in gone.values()) == [200] * 6 + [500]
    assert "Reasoning__Reasoning__e_snli" in gone
    assert not any(entry.benchmark == "BBH" for entry in bench.files("train"))
    by_task = {entry.task: entry for entry in bench.files("test")}
    # Two U+2028 stand in a question of GSM8K; every line of the file is one instance all the same.
    assert ledger[by_task["gsm8k_train"].stem]["read"] == (
        (DEVSET / "grade-school-math/grade_school_math/data/train.jsonl").read_bytes().count(b"\n")
    )
    references = [len(row.get("references", [row["tgt"]])) for e in bench.entries for row in bench.rows(e)]
    assert max(references) > 10
    assert not any("<<" in row["tgt"] for row in bench.rows(by_task["gsm8k_train"]))
    assert not any("<|endoftext|>" in row["tgt"] for e in bench.entries for row in bench.rows(e))
