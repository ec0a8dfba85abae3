"""Pack a corpus into rows for a whole run: an index, no tokens; or say what a mixture would do (--explain).

Examples: python tools/preprocess/build_plan.py --corpus corpus/train --mixture mixture.yaml \\
              --row-length 2048 --rows 1024000 --seed 1 --output plan/train
          python tools/preprocess/build_plan.py --corpus corpus/validation --once \\
              --level fully_held_out --row-length 2048 --output plan/held_out
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_iml.data.corpus import Corpus
    from megatron_iml.data.packing import PackingConfig


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="corpus folder of one split")
    parser.add_argument(
        "--mixture", type=Path, help="mixture YAML (default: examples-proportional, at most 4096 a task)"
    )
    parser.add_argument("--row-length", type=int, default=2048, help="slots of a row (default: %(default)s)")
    parser.add_argument(
        "--max-positions", type=int, default=2048, help="the model's longest document (default: %(default)s)"
    )
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--rows", type=int, help="rows to fill from the mixture: steps x rows per step")
    amount.add_argument("--once", action="store_true", help="every document exactly once (validation)")
    parser.add_argument("--level", help="only tasks of this generalisation level")
    parser.add_argument("--seed", type=int, default=1, help="of draws and order (default: %(default)s)")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", type=Path, help="plan folder to write")
    output.add_argument("--explain", action="store_true", help="print what the mixture draws, write nothing")
    arguments = parser.parse_args()
    if arguments.once and arguments.mixture:
        parser.error("--once takes every document once and follows no mixture: leave --mixture out")
    return arguments


def packing_config(arguments: argparse.Namespace) -> "PackingConfig":
    """The arguments as the library takes them."""
    from megatron_iml.data.mixture import Mixture, load_mixture
    from megatron_iml.data.packing import PackingConfig

    return PackingConfig(
        mixture=load_mixture(arguments.mixture) if arguments.mixture else Mixture(),
        row_length=arguments.row_length,
        rows=arguments.rows,
        seed=arguments.seed,
        level=arguments.level,
        max_positions=arguments.max_positions,
    )


def print_mixture(corpus: "Corpus", config: "PackingConfig") -> None:
    """What the mixture draws of every task, expected values."""
    from rich.console import Console
    from rich.table import Column, Table

    from megatron_iml.data.packing import explain_plan

    # Task names begin with their benchmark; folded, since a cut one says nothing.
    table = Table(
        Column("task", overflow="fold"), "examples", "effective", "share", "epochs", "tokens", "targets"
    )
    for task in explain_plan(corpus, config):
        table.add_row(
            task.name,
            f"{task.examples:,}",
            f"{task.effective_examples:,}",
            f"{task.share:.2%}",
            f"{task.epochs:.2f}",
            f"{task.tokens:,.0f}",
            f"{task.target_tokens:,.0f}",
        )
    Console().print(table)


def write(corpus: "Corpus", config: "PackingConfig", output: Path) -> None:
    """Build and write the plan, then print its rows, fill and ledger."""
    from rich.console import Console

    from megatron_iml.data.packing import build_plan
    from megatron_iml.data.plan import write_plan

    arrays, ledger = build_plan(corpus, config)
    manifest = write_plan(output, config.origin(corpus), arrays, ledger)
    total: Counter[str] = Counter()
    for line in ledger.values():
        total.update({key: value for key, value in line.items() if key != "dropped"})
        total.update(line["dropped"])
    rows = manifest["num_rows"]
    # A document takes one slot less than it has tokens.
    slots = total["tokens"] - total["packed"]
    console = Console()
    console.print(
        f"{output}: {rows:,} rows of {config.row_length:,} slots, "
        f"{slots / rows / config.row_length:.2%} filled, "
        f"{total['packed'] / rows:.1f} documents and {total['target_tokens'] / rows:.0f} targets a row",
        soft_wrap=True,
    )
    console.print(
        f"{total['drawn']:,} drawn = {total['packed']:,} packed ({total['truncated']:,} of them truncated) + "
        f"{total['target_too_long']:,} target too long + {total['no_target']:,} without a target",
        soft_wrap=True,
    )
    console.print(f"fingerprint {manifest['fingerprint']}", soft_wrap=True)


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    arguments = parse_arguments()
    from megatron_iml.data.corpus import Corpus

    try:
        config = packing_config(arguments)
        corpus = Corpus.open(arguments.corpus)
        if arguments.explain:
            print_mixture(corpus, config)
        else:
            write(corpus, config, arguments.output)
    # OSError: a folder where a file belongs, or no right to write, is the user's to mend as well.
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
