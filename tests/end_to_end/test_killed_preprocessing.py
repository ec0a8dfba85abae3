"""Preprocessing that is killed outright, again and again, writes what an undisturbed run writes."""

import json
import os
import random
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from megatron_iml.data.bench.folder import verify_bench
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.corpus.tokenizer import train_byte_level_bpe

ROOT = Path(__file__).parents[2]

# Bench, corpus and contamination in one process that kills itself at its n-th report of progress.
RUN = """
import os, signal, sys
from pathlib import Path
from megatron_iml.data.bench import chunks
from megatron_iml.data.bench.config import load_bench_config
from megatron_iml.data.bench.writer import build_bench
from megatron_iml.data.contamination.search import Search, find_contamination
from megatron_iml.data.corpus.build import BuildConfig, build_corpus
from megatron_iml.data.ledger import Drops

inputs, output, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chunks.CHUNK_BYTES = 200
reports = 0

def report(*_):
    global reports
    reports += 1
    if reports == last:
        os.kill(os.getpid(), signal.SIGKILL)

if not (output / "bench").is_dir():
    config = load_bench_config(inputs / "bench.yaml")
    drops = Drops(config.root)
    tasks = config.tasks(drops)
    build_bench(tasks, drops, config.splits, output / "bench", inputs=config.inputs_digest(), on_task=report)
split = BuildConfig(output / "bench", "train", inputs / "tokenizer", output / "corpus", shard_examples=60)
build_corpus(split, report, report)
find_contamination(Search(output / "bench", output / "contamination", ngram=3), report, report)
print(reports)
"""


def write_inputs(folder: Path) -> Path:
    (folder / "sources").mkdir(parents=True)
    for task in range(5):
        rows = [
            {"id": f"{i}", "src": f"What is {task} and {i} and more?", "tgt": f"It is {i}"} for i in range(40)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "sources" / f"B__Sums__t{task}.jsonl").write_text(lines)
    (folder / "bench.yaml").write_text(
        "sources: [{reader: source_target, folder: sources}]\nsplits: splits.yaml\n"
    )
    (folder / "splits.yaml").write_text("held_out_tasks: [t4]\ntest_examples_per_task: 5\n")
    train_byte_level_bpe(["What is 1 and 2 and more? It is 3"] * 9, 270, folder / "tokenizer")
    return folder


def run(inputs: Path, output: Path, last: int) -> subprocess.CompletedProcess[str]:
    (output / "contamination").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", RUN, str(inputs), str(output), str(last)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def bytes_below(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_killed_at_five_random_moments_the_bytes_are_the_same(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    whole = run(inputs, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    reports = int(whole.stdout)
    assert reports > 40, "enough moments to choose from"

    rng = random.Random(7)
    killed = 0
    # Early ones at first, since what is finished is not reported as often the second time.
    for last in sorted(rng.randint(1, reports) for _ in range(5)):
        done = run(inputs, tmp_path / "killed", last)
        killed += done.returncode == -signal.SIGKILL
    assert killed >= 4
    assert run(inputs, tmp_path / "killed", 0).returncode == 0
    assert bytes_below(tmp_path / "killed") == bytes_below(tmp_path / "whole")
    verify_bench(tmp_path / "killed" / "bench")
    assert len(Corpus.open(tmp_path / "killed" / "corpus" / "train").manifest["shards"]) == 2
