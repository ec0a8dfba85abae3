"""Whole training steps under the layouts of one node of four GPUs, and whether their losses agree.

    python benchmarks/layouts.py --output benchmarks/results --lengths LENGTHS.npz

Each case is a run of `train_step.py` under torchrun, with its gate: the start-up self-test on that very
layout. Cases of one model take the same rows from the same weights, so their losses must be equal but for
rounding: the table says how far apart they are, and a difference above what bf16 rounding explains fails the
run. Writes layouts.jsonl (a row a case, as `train_step.py` prints it, with the command) and layouts.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LOSS_TOLERANCE = 5e-3
"""bf16 rounds to 2^-9; a loss is a mean over a thousand targets and more, whose errors cancel."""


class Case(NamedTuple):
    """One layout of one model."""

    name: str
    gpus: int
    size: str
    row_length: int
    rows: int
    overrides: tuple[str, ...]


def layout(tensor: int = 1, pipeline: int = 1, *others: str) -> tuple[str, ...]:
    """Overrides of a layout; sequence parallelism goes with tensor parallelism."""
    sizes = (
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
    )
    return (*sizes, *others)


OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
WIDTH = ("model.num_layers=4",)
CASES = (
    Case("OPT-1.3B, one GPU", 1, "opt-1.3b", 16384, 8, layout()),
    Case("OPT-1.3B, DP4", 4, "opt-1.3b", 16384, 8, layout(1, 1, *OVERLAP)),
    Case("OPT-6.7B, TP2 x PP2", 4, "opt-6.7b", 8192, 16, layout(2, 2)),
    Case(
        "OPT-6.7B, TP2 x PP2 interleaved",
        4,
        "opt-6.7b",
        8192,
        16,
        layout(2, 2, "parallel.virtual_pipeline_model_parallel_size=2"),
    ),
    Case("OPT-6.7B, TP4", 4, "opt-6.7b", 8192, 16, layout(4)),
    Case("OPT-175B width, 4 layers, TP4", 4, "opt-175b", 8192, 8, layout(4, 1, *WIDTH)),
)


def command(case: Case, arguments: argparse.Namespace) -> list[str]:
    """The torchrun command line of a case, without the output folder."""
    lengths = ["--lengths", str(arguments.lengths)] if arguments.lengths else []
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.gpus)),
        "benchmarks/train_step.py",
        *("--size", case.size, "--row-length", str(case.row_length), "--rows", str(case.rows)),
        *("--dropout", str(arguments.dropout), "--draw-on-device", *lengths),
        *case.overrides,
    ]


def run(case: Case, arguments: argparse.Namespace) -> dict:
    """Run a case; its row, with name and command. A case that fails says why and is left out."""
    words = command(case, arguments)
    print("$", " ".join(words), flush=True)
    done = subprocess.run(words, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        raise RuntimeError(f"{case.name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    # The interpreter's path says nothing to a reader elsewhere.
    return {"name": case.name, "command": " ".join(["python", *words[1:]]), **json.loads(rows[-1])}


def disagreements(rows: list[dict]) -> list[str]:
    """Cases of one model, step by step: how far their losses are from the first case's."""
    lines = []
    first: dict[str, dict] = {}
    for row in rows:
        reference = first.setdefault(row["size"], row)
        pairs = zip(row["losses"], reference["losses"], strict=True)
        row["loss_distance"] = max(abs(ours - theirs) for ours, theirs in pairs)
        if row["loss_distance"] > LOSS_TOLERANCE:
            lines.append(f"{row['name']}: losses up to {row['loss_distance']:.1e} from {reference['name']}")
    return lines


def table(rows: list[dict]) -> str:
    """The results in Markdown, with what they were measured on."""
    lines = [
        "# Layouts of one node",
        "",
        f"- hardware: {rows[0]['device']}",
        f"- versions: {rows[0]['versions']}, commit {rows[0]['commit']}",
        "- command: `python benchmarks/layouts.py`; the command of each row is in layouts.jsonl",
        "- medians of five steps, fastest and slowest in brackets; real tokens are never padding",
        "- loss: of the last step; distance: the largest over the steps from the first row of that model",
        "",
        "| layout | GPUs | ms a step | real tokens/s | useful TFLOP/s per GPU | memory | loss | distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, fastest, slowest = row["milliseconds"]
        lines.append(
            f"| {row['name']} | {row['ranks']} | {median} ({fastest}-{slowest}) | "
            f"{row['real_tokens_per_second']:,} | {row['useful_tflops_per_gpu']} | "
            f"{row['peak_memory_gib']} GiB | {row['losses'][-1]:.4f} | {row['loss_distance']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cases; 1 if any failed or disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for layouts.jsonl and layouts.md")
    parser.add_argument("--lengths", type=Path, help=".npz with prompt_len and target_len")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    rows, problems = [], []
    for case in CASES:
        if arguments.only in case.name:
            try:
                rows.append(run(case, arguments))
            except RuntimeError as failure:
                # The others are worth having.
                problems.append(str(failure))
    problems += disagreements(rows)
    if rows:
        arguments.output.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / "layouts.jsonl").write_text(text)
        (arguments.output / "layouts.md").write_text(table(rows))
        print(table(rows))
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
