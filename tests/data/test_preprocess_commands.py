"""The preprocessing commands end to end on a tiny bench, and what they say when the user errs."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from corpora import lengths_document, write_corpus

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import Plan
from megatron_iml.data.rows.loader import Loader

ROOT = Path(__file__).parents[2]
COMMANDS = ("train_tokenizer", "build_corpus", "build_plan", "inspect_corpus")


def run(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "preprocess" / f"{command}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "bench"
    (folder / "train").mkdir(parents=True)
    rows = [{"id": f"{i}", "src": f"Double {i}.\nAnswer:", "tgt": f"{2 * i}"} for i in range(60)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "train" / "Sums__double__plain.jsonl").write_bytes(data)
    entry = {
        "task": "plain",
        "benchmark": "Sums",
        "category": "double",
        "level": "fully_supervised",
        "split": "train",
        "examples": 60,
        "metric": "exact_match",
        "sha256": sha256(data).hexdigest(),
        "file": "train/Sums__double__plain.jsonl",
        "parent": "",
    }
    (folder / "manifest.json").write_text(json.dumps({"format_version": 2, "seed": 1, "files": [entry]}))
    return folder


def test_from_bench_to_a_row_on_the_screen(bench: Path) -> None:
    folder = bench.parent
    steps = [
        run("train_tokenizer", "--input", bench, "--vocab-size", "280", "--output", folder / "tok"),
        run(
            "build_corpus",
            "--input",
            bench,
            "--tokenizer-model",
            folder / "tok",
            "--output-prefix",
            folder / "c",
        ),
        run("build_plan", "--input", folder / "c/train", "--row-length", "64", "--rows", "5", "--explain"),
        run(
            *("build_plan", "--input", folder / "c/train", "--row-length", "64", "--rows", "5"),
            *("--seed", "3", "--output", folder / "plan"),
        ),
        run(
            *("inspect_corpus", "--input", folder / "c/train", "--tokenizer-model", folder / "tok"),
            *("--plan", folder / "plan", "--row", "0"),
        ),
        run(
            *("inspect_corpus", "--input", folder / "c/train", "--tokenizer-model", folder / "tok"),
            *("--plan", folder / "plan", "--row", "0", "--positions"),
        ),
        run("inspect_corpus", "--input", folder / "c/train", "--plan", folder / "plan", "--totals"),
        run("inspect_corpus", "--input", folder / "c/train", "--plan", folder / "plan", "--validate"),
    ]
    for step in steps:
        assert step.returncode == 0, step.stderr
    assert "280 entries learned from 60 examples" in steps[0].stdout
    assert Corpus.open(folder / "c" / "train").fingerprint in steps[1].stdout
    assert "Sums__double__plain" in steps[2].stdout
    plan = Plan.open(folder / "plan")
    assert plan.num_rows == 5
    assert plan.fingerprint in steps[3].stdout
    first = int(plan.entries(0)["document"][0])
    assert f"Double {first}.\nAnswer: {2 * first}</s>" in steps[4].stdout
    assert f"{plan.targets_R[0]} targets" in steps[4].stdout
    row = Loader(Corpus.open(folder / "c" / "train"), plan).row(0)
    line = (0, row.tokens_T[0], "Double", 0, row.layout.end_T[0])
    assert steps[5].stdout.splitlines()[1].split() == [str(value) for value in line]
    assert f"targets  {row.target_rows_M[0]}:{row.target_ids_M[0]}" in steps[5].stdout
    drawn = plan.ledger["Sums__double__plain"]["drawn"]
    total = next(line for line in steps[6].stdout.splitlines() if " all " in line)
    assert total.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split()[:5:4] == ["all", str(drawn)]
    assert steps[7].stdout.count(": valid\n") == 2


def test_validation_that_finds_a_fault_exits_with_1(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"A__b__[red]": [lengths_document(3, 2)] * 4})
    path = corpus.folder / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x09\x00")
    result = run("inspect_corpus", "--input", corpus.folder, "--validate")
    assert result.returncode == 1
    assert "document 3: a target does not end with id 2" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--row", "0", "--tokenizer-model", "t"), "--row needs --plan"),
        (("--document", "0"), "--document and --row need --tokenizer-model"),
        (("--totals", "--positions"), "--positions needs --row"),
        (("--totals", "--validate"), "not allowed with argument"),
    ],
)
def test_inspect_says_what_goes_together(arguments: tuple[str, ...], message: str) -> None:
    result = run("inspect_corpus", "--input", "c", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "train_tokenizer",
            ("--input", "nowhere", "--vocab-size", "300", "--output", "t"),
            "no bench in nowhere",
        ),
        (
            "build_corpus",
            ("--input", "nowhere", "--tokenizer-model", "t", "--output-prefix", "c"),
            "no bench in nowhere",
        ),
        (
            "build_plan",
            ("--input", "nowhere", "--rows", "3", "--output", "p"),
            "no corpus in nowhere: manifest.json is missing",
        ),
        (
            "build_plan",
            ("--input", "nowhere", "--mixture", "none.yaml", "--rows", "3", "--output", "p"),
            "no file none.yaml",
        ),
        (
            "inspect_corpus",
            ("--input", "nowhere", "--tokenizer-model", "t", "--document", "0"),
            "no corpus in nowhere: manifest.json is missing",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    command: str, arguments: tuple[str, ...], message: str
) -> None:
    result = run(command, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--ngram", "0"), "argument --ngram: got 0, expected a whole number of 1 or more"),
        (("--threshold", "1"), "--threshold: got 1.0, expected 0 or more and below 1; 1 % is 0.01"),
    ],
)
def test_contamination_options_have_bounds(option: tuple[str, str], message: str) -> None:
    result = run("find_contamination", "--input", "bench", "--output", "found", *option)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(f"error: {message}\n")


@pytest.mark.parametrize(
    ("command", "other"),
    [
        ("build_corpus", "--output"),  # a beginning of --output-prefix
        ("build_corpus", "--tokenizer"),  # of --tokenizer-model
        ("build_plan", "--corpus"),
        ("build_plan", "--output-prefix"),
        ("inspect_corpus", "--corpus"),
        ("find_contamination", "--log"),
    ],
)
def test_an_option_has_one_name(command: str, other: str) -> None:
    result = run(command, f"{other}=1")
    assert result.returncode == 2
    # Not taken for a longer name either.
    assert f"no such option: {other}; " in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    # Importing the module is all that --help does before it prints.
    script = ROOT / "tools" / "preprocess" / f"{command}.py"
    code = (
        f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='imported'); "
        "print(sorted({'numpy', 'rich', 'tokenizers', 'torch', 'gigatoken'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
