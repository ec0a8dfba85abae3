"""Times the preprocessing commands, watches their private memory, and kills them on the way if asked to.

    python benchmarks/generated_sources.py --output work/sources ...      # see there
    python benchmarks/preprocessing.py --work work --tokenizer-model opt-tokenizer --workers 2 \\
        --stages bench corpus plan --results benchmarks/results/preprocessing.jsonl
    python benchmarks/preprocessing.py ... --kills 5        # kill -9 at five random moments, then finish

What leaves: a line of JSON for each stage: seconds (with its restarts), CPU seconds, the largest private
memory of all its processes together (sampled), how many examples a second, and a digest of every byte of the
output, which must be the same however often the stage was killed.
"""

import argparse
import hashlib
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "preprocess"
# Of memory, and of the end of a stage: its seconds are this much too many at most.
SAMPLING_SECONDS = 0.25
SPLITS = "validation_examples_per_task: 100\ntest_examples_per_task: 100\n"
# The paper's proportions of seven benchmarks, and 1 % for the eighth.
PROPORTIONS = {"GENA": 4, "GENB": 2, "GENC": 20, "GEND": 25, "GENE": 45, "GENF": 2, "GENG": 1, "GENH": 1}


@dataclass(frozen=True, slots=True)
class Measured:
    """One stage, run to its end."""

    seconds: float
    cpu_seconds: float
    peak_private_mib: float
    kills: int


def private_bytes(pid: int) -> int:
    """Private memory of a process and all below it; 0 for what has just ended."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            # Cheaper than the exact sum over all mappings, which would slow what is measured.
            status = Path(f"/proc/{one.pid}/status").read_text()
            anonymous = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
            total += int(anonymous.split()[1]) * 1024 if anonymous else 0
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return total
    return total


def run(command: Sequence[str | Path], moments: Sequence[float]) -> Measured:
    """Run a command to its end, killing it once after each of the given numbers of seconds."""
    # Over all tries: a stage that was killed is charged for what it had to do again.
    began, peak = time.perf_counter(), 0
    cpu_before = os.times()
    for moment in (*moments, float("inf")):
        started = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # A session of its own, since its workers must be killed with it.
        with subprocess.Popen(command, start_new_session=True, env=environment) as process:
            # Polled and not waited for: memory has to be looked at while it is there.
            while process.poll() is None:
                peak = max(peak, private_bytes(process.pid))
                if time.perf_counter() - started > moment:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                time.sleep(SAMPLING_SECONDS)
        # A stage that fails by itself is no measurement, killed or not.
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"{command} ended with status {process.returncode}")
        # Fewer kills than the row would say.
        if process.returncode == 0 and moment != float("inf"):
            raise SystemExit(
                f"{command} was done before it could be killed; give a smaller --expected-seconds"
            )
    # Of children that have ended, workers included: their parents wait for them.
    cpu = os.times()
    cpu_seconds = (
        cpu.children_user + cpu.children_system - cpu_before.children_user - cpu_before.children_system
    )
    return Measured(time.perf_counter() - began, cpu_seconds, peak / 2**20, len(moments))


def digest(folder: Path) -> str:
    """SHA-256 of all files of a folder with their names."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                # Names too: the same bytes under other names are another output.
                total.update(path.relative_to(folder).as_posix().encode())
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def processor() -> str:
    """The processor's own name, where the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commands(arguments: argparse.Namespace) -> dict[str, tuple[list[str | Path], Path]]:
    """The command and the output of every stage."""
    work: Path = arguments.work
    config = work / "bench.yaml"
    # Written here, so that a folder of sources is all that a run needs.
    config.write_text("sources: [{reader: source_target, folder: sources}]\nsplits: splits.yaml\n")
    (work / "splits.yaml").write_text(SPLITS)
    (work / "mixture.yaml").write_text(
        "examples_proportional_cap: 4096\nbenchmarks:\n"
        + "".join(
            f"  {name}: {{proportion: {share / 100}, unit: examples}}\n"
            for name, share in PROPORTIONS.items()
        )
    )
    workers = ["--workers", str(arguments.workers)]
    tokens = ["--tokenizer-model", arguments.tokenizer_model, "--output-prefix", work / "corpus"]
    plan = ["--mixture", work / "mixture.yaml", "--rows", str(arguments.rows), "--output", work / "plan"]
    return {
        "bench": (
            [TOOLS / "build_bench.py", "--config", config, "--output", work / "bench", *workers],
            work / "bench",
        ),
        "corpus": (
            [TOOLS / "build_corpus.py", "--input", work / "bench", *tokens, *workers],
            work / "corpus",
        ),
        "plan": (
            [TOOLS / "build_plan.py", "--input", work / "corpus" / "train", *plan, *workers],
            work / "plan",
        ),
    }


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder with sources/; outputs go beside it")
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    stages = ["bench", "corpus", "plan"]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the plan")
    parser.add_argument("--kills", type=int, default=0, help="times a stage is killed before it may finish")
    parser.add_argument("--expected-seconds", type=float, default=10.0, help="a kill comes before this")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to append to")
    return parser.parse_args()


def main() -> None:
    """Run the stages in their order."""
    arguments = parse_arguments()
    rng = random.Random(arguments.seed)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    # One after another, each on what the last one wrote.
    for stage in arguments.stages:
        command, output = commands(arguments)[stage]
        moments = [rng.uniform(1.0, arguments.expected_seconds) for _ in range(arguments.kills)]
        measured = run([sys.executable, *command], moments)
        bench = orjson.loads((arguments.work / "bench" / "manifest.json").read_bytes())
        # The bench stage counts all files, the others what they read: the training split.
        counted = [
            file["examples"] for file in bench["files"] if stage == "bench" or file["split"] == "train"
        ]
        row = {
            "stage": stage,
            "examples": sum(counted),
            "files": len(counted),
            "seconds": round(measured.seconds, 1),
            "examples_per_second": round(sum(counted) / measured.seconds),
            "cpu_seconds": round(measured.cpu_seconds, 1),
            "peak_private_mib": round(measured.peak_private_mib),
            "killed_after_seconds": [round(moment, 1) for moment in moments],
            "output_bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
            "output_sha256": digest(output),
            "workers": arguments.workers,
            "cores": len(os.sched_getaffinity(0)),
            "hardware": processor(),
            "python": platform.python_version(),
            "commit": commit,
        }
        with arguments.results.open("ab") as file:
            file.write(orjson.dumps(row) + b"\n")
        print(orjson.dumps(row).decode(), flush=True)


if __name__ == "__main__":
    main()
