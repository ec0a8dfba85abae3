"""A small chain, built once through the commands: files, bench, tokenizer, corpus, plans, train.yaml."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import CPU_ENVIRONMENT

ROOT = Path(__file__).parents[2]
STEPS = 40
LEVELS = ("fully_held_out", "partially_supervised", "fully_supervised")


def tool(name: str, *arguments: object) -> None:
    """Run a preprocessing command; its error is the test's."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=CPU_ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr


def launch(ranks: int, module: str, *arguments: object) -> subprocess.Popen:
    """Start a command on several gloo ranks, as examples/train_cpu.sh does; on one, without a launcher."""
    launcher = ["-m", "megatron_iml.launch", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, env=CPU_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def train_command(chain: Path, folder: Path) -> tuple[object, ...]:
    """Arguments of a training run of the chain into a folder of its own."""
    return "megatron_iml.train", "--config", chain / "train.yaml", f"training.output_directory={folder}"


def finish(process: subprocess.Popen) -> str:
    """Wait for a command that must succeed; return what it printed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def signal_all(process: subprocess.Popen, number: int) -> str:
    """Signal a launcher and its ranks, and wait until all are gone; return what they printed as errors."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    _, error = process.communicate(timeout=120)
    _, left = psutil.wait_procs(everyone, timeout=60)
    assert not left, f"still running: {left}"
    return error


def rows_of(folder: Path) -> list[dict]:
    """Step rows of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def write_benchmark(folder: Path) -> None:
    """Seven hand-made tasks in four categories, as src/tgt JSON lines."""
    folder.mkdir()
    tasks = {
        "MINE__Copying__copy": lambda i: (f"Repeat the number {i * 7 % 100}", f"{i * 7 % 100}"),
        "MINE__Copying__copy__twice": lambda i: (f"Say {i} two times", f"{i} {i}"),
        "MINE__Copying__spell": lambda i: (f"Spell {i} with spaces", " ".join(str(i))),
        "MINE__Counting__next": lambda i: (f"What comes after {i}?", f"{i + 1}"),
        "MINE__Parity__even": lambda i: (f"Is {i} even?", "yes" if i % 2 == 0 else "no"),
        "MINE__Order__larger": lambda i: (f"Which is larger, {i} or {i * 3 % 50}?", str(max(i, i * 3 % 50))),
    }
    for name, make in tasks.items():
        rows = []
        for i in range(80):
            source, target = make(i)
            row = {"src": source, "tgt": target}
            if "even" in name:
                row["candidates"] = ["yes", "no"]
            rows.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that `megatron_iml.train` and `.evaluate` need, and train.yaml to run them."""
    folder = tmp_path_factory.mktemp("chain")
    write_benchmark(folder / "benchmark")
    (folder / "splits.yaml").write_text(
        yaml.safe_dump(
            {
                "held_out_categories": ["Order"],
                "held_out_tasks": ["copy__twice"],
                "validation_examples_per_task": 5,
                "test_examples_per_task": 5,
                "seed": 3,
            }
        )
    )
    sources = [{"reader": "source_target", "folder": str(folder / "benchmark")}]
    (folder / "bench.yaml").write_text(yaml.safe_dump({"sources": sources, "splits": "splits.yaml"}))
    bench, tokenizer, corpus = (folder / name for name in ("bench", "tokenizer", "corpus"))
    tool("build_bench", "--config", folder / "bench.yaml", "--output", bench)
    tool("train_tokenizer", "--input", bench, "--vocab-size", 320, "--output", tokenizer)
    for split in ("train", "validation"):
        shared = ("--input", bench, "--tokenizer-model", tokenizer)
        tool("build_corpus", *shared, "--split", split, "--output-prefix", corpus)
    pack = ("--row-length", 128, "--max-positions", 64)
    rows = ("--rows", 4 * STEPS, "--output", folder / "plan")
    tool("build_plan", "--input", corpus / "train", *pack, *rows)
    for level in LEVELS:
        plan = ("--once", "--level", level, "--output", folder / "plans" / level)
        tool("build_plan", "--input", corpus / "validation", *pack, *plan)
    write_config(folder)
    return folder


def write_config(folder: Path) -> None:
    """A tiny OPT with dropout, steps of four rows."""
    content = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": 320,
            "max_position_embeddings": 64,
            "init_method_std": 0.05,
            "initialisation": "random",
            "kernel_backend": "reference",
        },
        "data": {
            "train_corpus": str(folder / "corpus" / "train"),
            "train_plan": str(folder / "plan"),
            "validation_corpus": str(folder / "corpus" / "validation"),
            "validation_plans": {level: str(folder / "plans" / level) for level in LEVELS},
            "row_length": 128,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "training": {"steps": STEPS, "global_batch_positions": 512, "precision": "fp32"},
        "checkpoint": {"save_interval": 10},
        "evaluation": {
            "bench": str(folder / "bench"),
            "tokenizer": str(folder / "tokenizer"),
            "max_new_tokens": 8,
        },
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(content))
