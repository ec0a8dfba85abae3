"""Tokenise one split of a bench into Megatron's .bin/.idx with a manifest; a killed run resumes.

Example: python tools/preprocess/build_corpus.py --input bench --split train \\
             --tokenizer-model opt-tokenizer --output-prefix corpus --workers 16

A SLURM array shares the work: give each job --job-index $SLURM_ARRAY_TASK_ID --num-jobs N, then run the same
command once without them.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from megatron_iml.command import add_work_arguments, command_parser, run_command


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="bench folder")
    parser.add_argument("--split", default="train", help="split to tokenise (default: %(default)s)")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="folder of vocabulary and merges")
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="<output-prefix>/<split> is the corpus folder"
    )
    parser.add_argument(
        # Each run compares gigatoken with tokenizers on a sample; where they differ, this is the way out.
        "--backend",
        choices=("gigatoken", "tokenizers"),
        default="gigatoken",
        help="encoder (same ids)",
    )
    add_work_arguments(parser, "examples", 1_000_000, parts="shards")
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Build the corpus, or a job's share of it, behind a progress bar."""
    from megatron_iml.data.corpus.build import BuildConfig, build_corpus
    from megatron_iml.data.jobs import Job
    from megatron_iml.data.progress import showing_progress

    config = BuildConfig(
        bench=arguments.input,
        split=arguments.split,
        tokenizer=arguments.tokenizer_model,
        output=arguments.output_prefix,
        backend=arguments.backend,
        workers=arguments.workers,
        job=Job(arguments.job_index, arguments.num_jobs),
    )
    with showing_progress("Tokenising", "examples", arguments.log_interval) as meter:
        # In examples: an example is one document or more, and only their number is known before.
        return build_corpus(config, meter.start, lambda examples, tokens: meter.advance(examples))


def print_summary(manifest: dict[str, Any], seconds: float) -> None:
    """Documents and tokens by benchmark."""
    from rich.console import Console
    from rich.table import Table

    table = Table("benchmark", "tasks", "examples", "documents", "tokens", "target tokens")
    # By benchmark: a bench has 1,500 tasks, whose lines inspect_corpus.py --totals prints.
    for benchmark in sorted({task["benchmark"] for task in manifest["tasks"]}):
        tasks = [task for task in manifest["tasks"] if task["benchmark"] == benchmark]
        documents = sum(task["stop_document"] - task["first_document"] for task in tasks)
        sums = [sum(task[key] for task in tasks) for key in ("examples", "tokens", "target_tokens")]
        table.add_row(
            benchmark, f"{len(tasks)}", f"{sums[0]:,}", f"{documents:,}", f"{sums[1]:,}", f"{sums[2]:,}"
        )
    console = Console()
    console.print(table)
    # The fingerprint is what plans and checkpoints quote.
    console.print(f"{seconds:.1f} s; fingerprint {manifest['fingerprint']}", soft_wrap=True)


def run(arguments: argparse.Namespace) -> None:
    """Build, or do this job's part, and say what became of it."""
    began = time.monotonic()
    manifest = build(arguments)
    # One job of several cannot know whether it is the last, so none of them puts the corpus together.
    if manifest is None:
        print("this job's shards are written; when all jobs are done, run without --job-index and --num-jobs")
    else:
        print_summary(manifest, time.monotonic() - began)


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
