"""What the commands share: how they name a configuration, and how they speak of a user's mistake.

    parser = config_parser(__doc__)              # --config FILE  section.field=value ...
    add_work_arguments(parser, "rows", 1000)     # --workers N  --log-interval N
    sys.exit(run_command(lambda: evaluate(parser.parse_args())))

A mistake is one line on standard error and exit status 2; anything else is a bug and keeps its traceback.
"""

import argparse
import difflib
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

MISTAKE = 2
"""Exit status of a command that was asked for something that cannot be done."""
SILENT_RANK_SECONDS = 5.0
"""Longer than ranks of a node are apart in finding a mistake; torchrun ends them once rank 0 has left."""


class _Parser(argparse.ArgumentParser):
    """Says first which option it does not know; argparse would say first which one is missing for it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):  # type: ignore[override]  # noqa: ANN201
        """As argparse's, but a word that begins with -- and is no option of this parser ends it first."""
        known = self._option_string_actions
        # Only what a subcommand takes is known before it is.
        for word in (sys.argv[1:] if args is None else args) if self._subparsers is None else ():
            if word == "--":
                break
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                meant = f"did you mean {near[0]}? " if near else ""
                self.error(f"no such option: {option}; {meant}allowed: {', '.join(sorted(known))}")
        return super().parse_args(args, namespace)


def command_parser(description: str, program: str | None = None) -> argparse.ArgumentParser:
    """A parser of options under their whole names, which shows a module's docstring as it stands."""
    return _Parser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # argparse takes every unique beginning for the option: --output would silently be --output-prefix,
        # until a later option makes it ambiguous.
        allow_abbrev=False,
    )


def config_parser(description: str, program: str | None = None) -> argparse.ArgumentParser:
    """A parser of `--config FILE` and overrides, to which a command adds its own options."""
    parser = command_parser(description, program)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see examples/recipes")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. training.steps=100")
    return parser


def at_least_one(text: str) -> int:
    """A whole number from 1 on, as argparse takes types."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of 1 or more")
    return int(text)


def add_work_arguments(
    parser: argparse.ArgumentParser, items: str, log_interval: int, parts: str | None = None
) -> None:
    """Add the options of long work: its processes and log, and jobs where there are `parts` to share out."""
    parser.add_argument(
        "--workers", type=at_least_one, default=1, help="processes; same bytes (default: %(default)s)"
    )
    parser.add_argument(
        "--log-interval",
        type=at_least_one,
        default=log_interval,
        help=f"{items} between log lines (default: %(default)s)",
    )
    if parts is not None:
        parser.add_argument("--job-index", type=int, default=0, help="which of --num-jobs this is, from 0")
        parser.add_argument(
            "--num-jobs", type=at_least_one, default=1, help=f"jobs that share the {parts} out"
        )


def quiet_engine() -> None:
    """Silence what megatron-core and torch say, on every rank, of packages and names nobody here misses."""
    # Called before megatron-core is imported: it warns while it is.
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated",
        r"`torch\.distributed\.\w+` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


def refuse(mistake: Exception, status: int = MISTAKE) -> int:
    """Say what is wrong and return the exit status."""
    # Under a launcher every rank has found the same mistake: one of them says it.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {mistake}", file=sys.stderr)
    else:
        # torchrun looks every 0.1 s and ends all ranks when one has left: the one that speaks must be first.
        time.sleep(SILENT_RANK_SECONDS)
    return status


def run_command(command: Callable[[], int | None]) -> int:
    """Run it and return the exit status: its own if it returns one, else 0; 2 for a user's mistake."""
    quiet_engine()
    try:
        return command() or 0
    # OSError: a folder where a file belongs, or no right to write, is the user's to mend as well.
    except (ValueError, OSError) as mistake:
        return refuse(mistake)
