"""Whole training steps under the layouts of one node, and whether their losses agree.

    python benchmarks/layouts.py --output benchmarks/results --lengths LENGTHS.npz --gpus 2

Each case is a run of `train_step.py` under torchrun, with its gate: the start-up self-test on that very
layout. Cases of one model take the same rows from the same weights, so their losses must be equal but for
rounding: the table says how far apart they are, and a difference above what bf16 rounding explains fails the
run. Writes layouts.jsonl (a row a case, as `train_step.py` prints it, with the command) and layouts.md after
every case. A case that fails, takes too long or wants more GPUs or memory is named there with the reason.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

LOSS_TOLERANCE = 5e-3
"""bf16 rounds to 2^-9; a loss is a mean over a thousand targets and more, whose errors cancel."""
WARM_UP = 2
"""Steps of a case that are not counted: the first one compiles."""


class Case(NamedTuple):
    """One layout of one model."""

    name: str
    gpus: int
    size: str
    row_length: int
    rows: int
    overrides: tuple[str, ...]
    gib: int = 80
    """Memory of a GPU that it fits."""


def layout(tensor: int = 1, pipeline: int = 1, *others: str) -> tuple[str, ...]:
    """Overrides of a layout; sequence parallelism goes with tensor parallelism."""
    sizes = (
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
    )
    # One way to write every layout, defaults too: the rows of layouts.jsonl can be compared key by key.
    return (*sizes, *others)


OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
INTERLEAVED = ("parallel.virtual_pipeline_model_parallel_size=2",)
CASES = (
    # One step is 131,072 positions for this size and 65,536 for the others, whatever the layout.
    Case("OPT-1.3B, one GPU", 1, "opt-1.3b", 16384, 8, layout()),
    Case("OPT-1.3B, DP2", 2, "opt-1.3b", 16384, 8, layout(1, 1, *OVERLAP)),
    Case("OPT-1.3B, DP4", 4, "opt-1.3b", 16384, 8, layout(1, 1, *OVERLAP)),
    Case("OPT-6.7B, TP2", 2, "opt-6.7b", 8192, 8, layout(2), 140),
    Case("OPT-6.7B, PP2", 2, "opt-6.7b", 8192, 8, layout(1, 2), 140),
    Case("OPT-175B width, 4 layers, TP2", 2, "opt-175b", 8192, 8, layout(2, 1, "model.num_layers=4"), 140),
    Case("OPT-6.7B, PP2 interleaved", 2, "opt-6.7b", 8192, 8, layout(1, 2, *INTERLEAVED), 140),
    Case("OPT-6.7B, DP2", 2, "opt-6.7b", 8192, 8, layout(1, 1, *OVERLAP), 140),
    Case("OPT-6.7B, TP2 x PP2", 4, "opt-6.7b", 8192, 8, layout(2, 2)),
    Case("OPT-6.7B, TP2 x PP2 interleaved", 4, "opt-6.7b", 8192, 8, layout(2, 2, *INTERLEAVED)),
    Case("OPT-6.7B, TP4", 4, "opt-6.7b", 8192, 8, layout(4)),
    Case("OPT-175B width, 4 layers, TP4", 4, "opt-175b", 8192, 8, layout(4, 1, "model.num_layers=4")),
)


def command(case: Case, arguments: argparse.Namespace) -> list[str]:
    """The torchrun command line of a case."""
    lengths = ["--lengths", str(arguments.lengths)] if arguments.lengths else []
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.gpus)),
        "benchmarks/train_step.py",
        *("--size", case.size, "--row-length", str(arguments.row_length or case.row_length)),
        *("--rows", str(case.rows), "--steps", str(arguments.steps), "--warm-up", str(WARM_UP)),
        *("--dropout", str(arguments.dropout), "--draw-on-device", *lengths),
        *case.overrides,
        *arguments.overrides,
    ]


def run(case: Case, arguments: argparse.Namespace, limit_seconds: float) -> dict:
    """Run a case; its row, with name and command.

    Raises:
        RuntimeError: saying why there is none.
    """
    # A process each: what one case leaves in memory, or takes down, is no matter for the next.
    words = command(case, arguments)
    print("$", " ".join(words), flush=True)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        # The launcher then ends its ranks, which killed itself it would leave on the GPUs.
        process.terminate()
        _, errors = process.communicate()
        raise RuntimeError(f"did not end within {limit_seconds:.0f} s:\n{errors[-2000:]}") from None
    # Libraries write to the same stream.
    rows = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not rows:
        raise RuntimeError(f"ended with status {process.returncode}:\n{errors[-4000:]}")
    # The interpreter's path says nothing to a reader elsewhere.
    return {"name": case.name, "command": " ".join(["python", *words[1:]]), **json.loads(rows[-1])}


def disagreements(rows: list[dict]) -> list[str]:
    """Cases of one model, step by step: how far their losses are from the first case's."""
    lines = []
    first: dict[tuple, dict] = {}
    for row in rows:
        # The width of OPT-175B with a few layers is a model of its own.
        reference = first.setdefault((row["size"], row["layers"]), row)
        # Step by step: a fault that shows once and heals is a fault.
        pairs = zip(row["losses"], reference["losses"], strict=True)
        row["loss_distance"] = max(abs(ours - theirs) for ours, theirs in pairs)
        if row["loss_distance"] > LOSS_TOLERANCE:
            lines.append(f"{row['name']}: losses up to {row['loss_distance']:.1e} from {reference['name']}")
    return lines


def table(rows: list[dict], left_out: list[tuple[str, str]], steps: int) -> str:
    """The results in Markdown, with what they were measured on."""
    lines = [
        "# Layouts of one node",
        "",
        f"- hardware: {rows[0]['device']}",
        f"- versions: {rows[0]['versions']}, commit {rows[0]['commit']}",
        "- command: `python benchmarks/layouts.py`; the command of each row is in layouts.jsonl",
        f"- medians of {steps - WARM_UP} steps, fastest and slowest in brackets; padding is no real token",
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
    lines += ["", *(f"Left out: {name}: {reason.splitlines()[0]}" for name, reason in left_out)]
    return "\n".join(lines).rstrip() + "\n"


def memory_of_gpus() -> list[float]:
    """GiB of each GPU of this machine."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return [int(mebibytes) / 1024 for mebibytes in listed.split()]


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for layouts.jsonl and layouts.md")
    parser.add_argument("--lengths", type=Path, help=".npz with prompt_len and target_len")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--steps", type=int, default=8, help=f"{WARM_UP} of them warm up")
    parser.add_argument("--case-seconds", type=float, default=300, help="a case that takes longer is stopped")
    parser.add_argument("--seconds", type=float, default=3600, help="when to begin no more cases")
    parser.add_argument("--gpus", type=int, help="use so many (default: all)")
    parser.add_argument("--row-length", type=int, help="of every case, in place of its own")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for every case")
    return parser.parse_args()


def reason_against(case: Case, gpus: int, gib: float) -> str | None:
    """Why a case cannot run here, if so."""
    if case.gpus > gpus:
        return f"needs {case.gpus} GPUs, {gpus} are used"
    # Cards have a little less than their name says.
    if case.gib > 1.05 * gib:
        return f"needs GPUs of {case.gib} GiB, these have {gib:.0f}"
    return None


def main() -> int:
    """Run the cases; 1 if any failed or disagrees, 2 if none has the name asked for."""
    arguments = parse_arguments()
    memory = memory_of_gpus()
    gpus = arguments.gpus or len(memory)
    # Checked between cases only: --case-seconds bounds each of them.
    deadline = time.monotonic() + arguments.seconds
    rows: list[dict] = []
    left_out: list[tuple[str, str]] = []
    problems: list[str] = []
    failed = False
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        names = ", ".join(repr(case.name) for case in CASES)
        print(f"error: --only: got {arguments.only!r}; allowed: a part of one of {names}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    for case in cases:
        reason = reason_against(case, gpus, min(memory))
        if reason is None and time.monotonic() > deadline:
            reason = f"{arguments.seconds:.0f} s were over"
        if reason is None:
            try:
                rows.append(run(case, arguments, arguments.case_seconds))
            except RuntimeError as failure:
                # The others are worth having.
                reason, failed = str(failure), True
        if reason is not None:
            print(f"{case.name}: {reason}", file=sys.stderr)
            left_out.append((case.name, reason))
        # Anew for all rows: it also writes their distances, which the table shows.
        problems = disagreements(rows)
        if rows:
            # Now, since the next case may be the last.
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (arguments.output / "layouts.jsonl").write_text(text)
            (arguments.output / "layouts.md").write_text(table(rows, left_out, arguments.steps))
    if rows:
        print(table(rows, left_out, arguments.steps))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or failed else 0


if __name__ == "__main__":
    sys.exit(main())
