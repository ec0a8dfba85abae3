"""Write a bench without what a decision file takes out of it; see find_contamination.py.

Example: python tools/preprocess/remove_contamination.py --input bench --findings contamination --output clean
"""

import argparse
import sys
from pathlib import Path

from megatron_iml.command import command_parser, run_command


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="bench folder, which stays as it is")
    parser.add_argument("--findings", type=Path, required=True, help="folder with decisions.yaml")
    parser.add_argument("--output", type=Path, required=True, help="bench folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the bench in --output")
    return parser.parse_args()


def remove(arguments: argparse.Namespace) -> None:
    """Write the bench and print what went, by file."""
    from megatron_iml.data.bench.folder import Bench
    from megatron_iml.data.contamination.removal import remove_contamination

    # By file: a task has one for each of its splits, and only one of them loses rows.
    before = {entry.file: entry.examples for entry in Bench.open(arguments.input).entries}
    bench = remove_contamination(
        arguments.input, arguments.findings, arguments.output, overwrite=arguments.overwrite
    )
    after = {entry.file: entry.examples for entry in bench.entries}
    for file, examples in before.items():
        # A file that lost all of its rows is not in the new bench.
        if gone := examples - after.get(file, 0):
            print(f"{file}: {gone:,} of {examples:,} rows removed")
    print(f"{bench.folder}: {sum(after.values()):,} of {sum(before.values()):,} rows kept")


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: remove(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
