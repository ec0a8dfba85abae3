"""Find training tasks that share runs of words with evaluation tasks; write a report and a decision file.

Examples: python tools/preprocess/find_contamination.py --input bench --output contamination --workers 16
          (read contamination/report.md, change contamination/decisions.yaml)
          python tools/preprocess/remove_contamination.py --input bench --findings contamination \\
              --output clean

A killed search goes on where it was when the same command is run again.
"""

import argparse
import sys
from pathlib import Path

from megatron_iml.command import add_work_arguments, at_least_one, command_parser, run_command


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="bench folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the findings")
    # 13 words and 1 % are the paper's: it looked at pairs above that by hand.
    parser.add_argument(
        "--ngram", type=at_least_one, default=13, help="words of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.01,
        help="pairs are reported above this share of an evaluation file (default: %(default)s)",
    )
    add_work_arguments(parser, "rows", 1_000_000)
    arguments = parser.parse_args()
    # 1 would be meant for 1 %, and report nothing.
    if not 0 <= arguments.threshold < 1:
        parser.error(f"--threshold: got {arguments.threshold}, expected 0 or more and below 1; 1 % is 0.01")
    return arguments


def find(arguments: argparse.Namespace) -> None:
    """Search behind a progress bar, write the report, print its head."""
    from megatron_iml.data.contamination.report import DECISION_FILE, REPORT, write_report
    from megatron_iml.data.contamination.search import Search, find_contamination
    from megatron_iml.data.progress import showing_progress

    # The folder keeps what the search has written, or a killed one could not go on.
    search = Search(arguments.input, arguments.output, arguments.ngram, arguments.workers)
    with showing_progress("Comparing", "rows", arguments.log_interval) as meter:
        findings = find_contamination(search, meter.start, meter.advance)
    pairs = write_report(findings, arguments.threshold)
    # Of these alone the decision file proposes to remove rows; the others share instructions.
    specific = sum(pair.specific > arguments.threshold * pair.evaluation.examples for pair in pairs)
    print(
        f"{len(pairs)} pairs share more than {arguments.threshold:.1%}, "
        f"{specific} of them beyond instructions; "
        f"read {arguments.output / REPORT}, decide in {arguments.output / DECISION_FILE}"
    )


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: find(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
