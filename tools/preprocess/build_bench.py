"""Read benchmark folders and write them as one bench with splits, manifest and ledger.

Example: python tools/preprocess/build_bench.py --config examples/demo/bench.yaml --output bench

A killed run goes on where it was when the same command is run again. A SLURM array shares the work: give each
job --job-index $SLURM_ARRAY_TASK_ID --num-jobs N, then run the same command once without them.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iml.command import add_work_arguments, command_parser, run_command

if TYPE_CHECKING:
    from megatron_iml.data.bench.folder import Bench


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML with sources and splits")
    parser.add_argument("--output", type=Path, required=True, help="bench folder to write")
    parser.add_argument(
        "--source-root", type=Path, help="where relative source folders lie (default: beside the config)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the bench in --output")
    add_work_arguments(parser, "tasks", 100, parts="tasks")
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> "Bench | None":
    """Write the bench, or a job's share of it, behind a progress bar."""
    from megatron_iml.data.bench.config import load_bench_config
    from megatron_iml.data.bench.levels import missing_names
    from megatron_iml.data.bench.writer import build_bench
    from megatron_iml.data.jobs import Job
    from megatron_iml.data.ledger import Drops
    from megatron_iml.data.progress import showing_progress

    config = load_bench_config(arguments.config, arguments.source_root)
    job = Job(arguments.job_index, arguments.num_jobs)
    drops = Drops(config.root)
    with showing_progress("Writing", "tasks", arguments.log_interval) as meter:
        tasks = config.tasks(drops)
        # Under `missing_names: allow` alone: else the call refuses, since a misspelt name holds nothing out.
        if missing := missing_names(config.splits, tasks):
            print(f"splits: the sources hold no {', no '.join(missing)}", file=sys.stderr)
        # The tasks of this job, or its bar would never be full.
        meter.start(sum(job.owns(number) for number in range(len(tasks))))
        return build_bench(
            tasks,
            drops,
            config.splits,
            arguments.output,
            overwrite=arguments.overwrite,
            # What a killed run has written is kept only if it was made from the same files and options.
            inputs=config.inputs_digest(),
            workers=arguments.workers,
            job=job,
            on_task=lambda: meter.advance(1),
        )


def print_summary(bench: "Bench") -> None:
    """Tasks and examples by level and split, then what was dropped and why."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("level", "split", "tasks", "categories", "examples", title=f"{bench.folder}")
    groups = defaultdict(list)
    for entry in bench.entries:
        groups[entry.level, entry.split].append(entry)
    for (level, split), entries in sorted(groups.items()):
        # Of this level and split: a category may have tasks on two levels.
        categories = len({entry.category for entry in entries})
        examples = sum(entry.examples for entry in entries)
        table.add_row(level, split, f"{len(entries)}", f"{categories}", f"{examples:,}")
    console.print(table)

    ledger = bench.ledger()
    dropped: Counter[str] = Counter()
    for counts in ledger["tasks"].values():
        dropped.update(counts["dropped"])
    # Dropped includes rows beyond max_examples_per_task, which nothing is wrong with.
    read = sum(counts["read"] for counts in ledger["tasks"].values())
    console.print(f"read {read:,} instances of {len(ledger['tasks'])} tasks; dropped {dropped.total():,}")
    for reason, count in dropped.most_common():
        console.print(f"  {count:,} {reason}")
    # Reason -> names: twenty absent folders of one optional source are one line.
    groups_of_names: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in ledger["skipped_files"].items():
        groups_of_names[f"passed over, {reason}"].append(name)
    groups_of_names["no examples left"] = [name for name, c in ledger["tasks"].items() if not c["written"]]
    for what, names in groups_of_names.items():
        # All of them are in the ledger; a partial checkout lacks a hundred.
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            console.print(f"{what}: {', '.join(names[:3])}{more}", markup=False, soft_wrap=True)


def run(arguments: argparse.Namespace) -> None:
    """Build, or do this job's part, and say what became of it."""
    bench = build(arguments)
    if bench is None:
        print("this job's tasks are written; when all jobs are done, run without --job-index and --num-jobs")
    else:
        print_summary(bench)


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
