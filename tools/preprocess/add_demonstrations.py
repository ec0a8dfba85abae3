"""Write a bench whose prompts show solved examples of their task first (k-shot).

Examples: python tools/preprocess/add_demonstrations.py --input bench --shots 5 --output bench-5-shot
          add_demonstrations.py --input bench --shots 5 --zipf 2 --split train --output bench-metaicl
"""

import argparse
import sys
from pathlib import Path

from megatron_iml.command import command_parser, run_command


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="zero-shot bench folder")
    parser.add_argument("--output", type=Path, required=True, help="bench folder to write")
    parser.add_argument("--shots", type=int, required=True, help="demonstrations of a prompt")
    parser.add_argument(
        "--zipf",
        type=float,
        # 0 for off: Zipf's law needs an exponent above 1.
        default=0.0,
        help="exponent of Zipf's law for their number, --shots at most (default: every prompt has --shots)",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=("train", "validation", "test"),
        # Not train: the paper trains without demonstrations.
        default=["validation", "test"],
        help="what is written (default: validation test)",
    )
    parser.add_argument("--separator", default="\\n\\n", help=r"between demonstrations (default: \n\n)")
    parser.add_argument(
        # Some 1,500 tokens, which leaves a quarter of 2,048 positions to the answer.
        "--longest-source",
        type=int,
        default=6000,
        help="characters of a prompt (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="draws demonstrations (default: %(default)s)")
    return parser.parse_args()


def add(arguments: argparse.Namespace) -> None:
    """Write the bench with demonstrations and say what is in it."""
    from megatron_iml.data.bench.demonstrations import Demonstrations, add_demonstrations
    from megatron_iml.data.bench.folder import Bench

    how = Demonstrations(
        shots=arguments.shots,
        zipf=arguments.zipf,
        # A shell passes backslash and n; a real newline in quotes works as well.
        separator=arguments.separator.replace("\\n", "\n"),
        longest_source=arguments.longest_source,
        seed=arguments.seed,
    )
    bench = add_demonstrations(Bench.open(arguments.input), how, arguments.output, arguments.split)
    rows = sum(entry.examples for entry in bench.entries)
    print(f"{rows:,} prompts in {len(bench.entries)} files of {bench.folder}")
    # Prompts that lost demonstrations for their length are no loss of rows, so the ledger has them there.
    repaired: dict[str, int] = {}
    for account in bench.ledger()["tasks"].values():
        for what, count in account["repaired"].items():
            repaired[what] = repaired.get(what, 0) + count
    for what, count in sorted(repaired.items()):
        print(f"  {count:,} {what}")


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: add(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
