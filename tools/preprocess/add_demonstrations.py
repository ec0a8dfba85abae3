"""Write a bench whose prompts show solved examples of their task first (k-shot).

Examples: python tools/preprocess/add_demonstrations.py --input bench --shots 5 --output bench-5-shot
          add_demonstrations.py --input bench --shots 5 --zipf 2 --split train --output bench-metaicl
"""

import argparse
import sys
from pathlib import Path

from megatron_iml.command import run_command


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="zero-shot bench folder")
    parser.add_argument("--output", type=Path, required=True, help="bench folder to write")
    parser.add_argument("--shots", type=int, required=True, help="demonstrations of a prompt")
    parser.add_argument(
        "--zipf",
        type=float,
        default=0.0,
        help="exponent of Zipf's law for their number, --shots at most (default: every prompt has --shots)",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=("train", "validation", "test"),
        default=["validation", "test"],
        help="what is written (default: validation test)",
    )
    parser.add_argument("--separator", default="\\n\\n", help=r"between demonstrations (default: \n\n)")
    parser.add_argument(
        "--longest-source", type=int, default=6000, help="characters of a prompt (default: %(default)s)"
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
        separator=arguments.separator.replace("\\n", "\n"),
        longest_source=arguments.longest_source,
        seed=arguments.seed,
    )
    bench = add_demonstrations(Bench.open(arguments.input), how, arguments.output, arguments.split)
    rows = sum(entry.examples for entry in bench.entries)
    print(f"{rows:,} prompts in {len(bench.entries)} files of {bench.folder}")
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
