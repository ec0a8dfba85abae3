"""Pack a corpus into rows for a whole run: an index, no tokens; or say what a mixture would do (--explain).

Examples: python tools/preprocess/build_plan.py --input corpus/train --mixture mixture.yaml \\
              --row-length 2048 --rows 1024000 --seed 1 --workers 8 --output plan/train
          python tools/preprocess/build_plan.py --input corpus/validation --once \\
              --level fully_held_out --row-length 2048 --output plan/held_out
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_iml.command import add_work_arguments, command_parser, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_iml.data.corpus.folder import Corpus
    from megatron_iml.data.plan.packing import PackingConfig
    from megatron_iml.data.plan.shares import Expected


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="corpus folder of one split")
    add("--mixture", type=Path, help="mixture YAML (default: examples-proportional, at most 4096 a task)")
    add("--row-length", type=int, default=2048, help="slots of a row (default: %(default)s)")
    # Of the model and not of the row: rows of 16,384 hold documents of 2,048 at most.
    add("--max-positions", type=int, default=2048, help="the model's longest document (default: %(default)s)")
    # No default: how long a run is, or that it is validation, is not for a tool to guess.
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--rows", type=int, help="rows to fill from the mixture: steps x rows per step")
    amount.add_argument("--once", action="store_true", help="every document exactly once (validation)")
    add("--level", help="only tasks of this generalisation level")
    add(
        "--share-prefixes",
        type=int,
        default=0,
        # Branches and not documents: 0 then means that nothing hangs on anything.
        metavar="BRANCHES",
        help="store a common beginning of 32 tokens or more once for up to 1 + BRANCHES documents that meet "
        "in a window (default: off)",
    )
    add("--window", type=int, default=1 << 14, help="documents packed together (default: %(default)s)")
    add("--seed", type=int, default=1, help="of draws and order (default: %(default)s)")
    add_work_arguments(parser, "documents", 1_000_000)
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", type=Path, help="plan folder to write")
    output.add_argument("--explain", action="store_true", help="print what the mixture draws, write nothing")
    arguments = parser.parse_args()
    # By hand: --once is in a group of options that exclude one another, and argparse allows one group only.
    if arguments.once and arguments.mixture:
        parser.error("--once takes every document once and follows no mixture: leave --mixture out")
    return arguments


def packing_config(arguments: argparse.Namespace) -> "PackingConfig":
    """The arguments as the library takes them."""
    from megatron_iml.data.plan.mixture import Mixture, load_mixture
    from megatron_iml.data.plan.packing import PackingConfig

    return PackingConfig(
        mixture=load_mixture(arguments.mixture) if arguments.mixture else Mixture(),
        row_length=arguments.row_length,
        rows=arguments.rows,
        seed=arguments.seed,
        level=arguments.level,
        max_positions=arguments.max_positions,
        branches=arguments.share_prefixes,
        window=arguments.window,
    )


def compact(number: float) -> str:
    """A number in three digits: 23.5M says more of an expected value than 23,514,208."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # k from 10,000 on: people know caps such as 4,096 by their digits.
        if number >= 10 * size or (unit != "k" and number >= size):
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def print_expected(console: "Console", title: str, lines: "Sequence[Expected]") -> None:
    """A table of expected values and what part of the whole each is, in every unit."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    numbers = ("docs", "capped", "drawn", "epochs", "tokens", "targets", "% ex", "% tok", "% tgt")
    # Task names begin with their benchmark; folded, since a cut one says nothing.
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table(
        Column(title, overflow="fold", min_width=12), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    # Parts of the lines shown; each unit has its own, and the mixture's file names only one of them.
    totals = [
        sum(values) for values in zip(*((x.draws, x.tokens, x.target_tokens) for x in lines), strict=True)
    ]
    for line in lines:
        amounts = (line.draws, line.tokens, line.target_tokens)
        table.add_row(
            line.name,
            compact(line.documents),
            compact(line.effective),
            compact(line.draws),
            f"{line.epochs:.2f}",
            compact(line.tokens),
            compact(line.target_tokens),
            *(f"{100 * amount / max(total, 1):.2f}" for amount, total in zip(amounts, totals, strict=True)),
        )
    console.print(table)


def explain(corpus: "Corpus", config: "PackingConfig") -> int:
    """Print what the mixture would draw; exit code 2 if it cannot be followed."""
    from rich.console import Console

    from megatron_iml.data.plan.build import foresee_plan
    from megatron_iml.data.plan.shares import absent_benchmarks, explain_benchmarks, explain_tasks

    outlook = foresee_plan(corpus, config)
    tasks = explain_tasks(config.mixture, outlook.blend, outlook.sizes)
    terminal = Console()
    # A pipe has no width, and the tables need some.
    console = terminal if terminal.is_terminal else Console(width=max(120, terminal.width))
    print_expected(console, "task", tasks)
    print_expected(console, "benchmark", explain_benchmarks(tasks, outlook.sizes))
    # About: how many documents fill a row is an average until they are packed.
    lines = [f"about {outlook.blend.draws:,} documents fill {config.rows:,} rows"]
    if absent := absent_benchmarks(config.mixture, outlook.sizes):
        lines.append(f"not in the corpus: {', '.join(absent)}; the others divide their part")
    never = [size.name for size, quota in zip(outlook.sizes, outlook.quotas_K, strict=True) if quota == 0]
    if never:
        lines.append(
            f"{len(never):,} of {len(tasks):,} tasks get less than one document: {', '.join(never[:10])}"
            f"{', ...' if len(never) > 10 else ''}"
        )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    # After the tables, which show by how much; the build would stop at the same words.
    for shortfall in outlook.blend.shortfalls:
        print(f"cannot be had: {shortfall}", file=sys.stderr)
    # As the build would, so that a script can ask first.
    return 2 if outlook.blend.shortfalls else 0


def write(corpus: "Corpus", config: "PackingConfig", arguments: argparse.Namespace) -> None:
    """Build the plan behind a progress bar, with log lines for files that are no terminal."""
    from megatron_iml.data.plan.build import build_plan
    from megatron_iml.data.progress import showing_progress

    began = time.monotonic()
    with showing_progress("Packing", "documents", arguments.log_interval) as meter:

        def advance(documents: int, total: int) -> None:
            """Count a window; how many documents the rows take is known once the first one is drawn."""
            meter.expect(total)
            meter.advance(documents)

        manifest = build_plan(corpus, config, arguments.output, advance, arguments.workers)
    print_summary(arguments.output, manifest, time.monotonic() - began)


def print_summary(output: Path, manifest: dict[str, Any], seconds: float) -> None:
    """Rows, fill and the ledger summed over tasks."""
    from rich.console import Console

    total: Counter[str] = Counter()
    for line in manifest["ledger"].values():
        # `dropped` is itself a table of reasons.
        total.update({key: value for key, value in line.items() if key != "dropped"})
        total.update(line["dropped"])
    rows, row_length = manifest["num_rows"], manifest["origin"]["row_length"]
    # A document takes one slot less than it has tokens, and none for what it shares.
    slots = total["tokens"] - total["packed"] - total["shared_tokens"]
    lines = [
        f"{output}: {rows:,} rows of {row_length:,} slots, {slots / rows / row_length:.2%} filled, "
        f"{total['packed'] / rows:.1f} documents and {total['target_tokens'] / rows:.0f} targets a row",
        f"{total['drawn']:,} drawn = {total['packed']:,} packed ({total['truncated']:,} of them truncated) + "
        f"{total['target_too_long']:,} target too long + {total['no_target']:,} without a target",
        f"{seconds:.1f} s; fingerprint {manifest['fingerprint']}",
    ]
    # Before packing each document would have taken its own slots: what is stored and what is shared.
    if total["shared_tokens"]:
        saved = (slots + total["shared_tokens"]) / slots
        lines.insert(1, f"{total['shared_tokens']:,} tokens shared: {saved:.2f} times fewer to compute")
    for line in lines:
        Console().print(line, soft_wrap=True)


def run(arguments: argparse.Namespace) -> int | None:
    """Explain the mixture or write the plan."""
    from megatron_iml.data.corpus.folder import Corpus

    config = packing_config(arguments)
    corpus = Corpus.open(arguments.input)
    return explain(corpus, config) if arguments.explain else write(corpus, config, arguments)


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
