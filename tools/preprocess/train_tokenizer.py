"""Learn a byte-level BPE from a bench, for models of your own size; OPT's models need OPT's vocabulary.

Example: python tools/preprocess/train_tokenizer.py --input bench --vocab-size 4096 --output tokenizer
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_iml.command import command_parser, run_command


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="bench folder")
    parser.add_argument("--split", default="train", help="split to learn from (default: %(default)s)")
    # No default: model.vocab_size must hold it, and the two are set in different files.
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, 4 special ones included")
    parser.add_argument("--output", type=Path, required=True, help="folder for vocab.json and merges.txt")
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> int:
    """Write the tokenizer behind a progress bar; return how many examples it was learned from."""
    from rich.console import Console
    from rich.progress import Progress

    from megatron_iml.data.bench.folder import Bench
    from megatron_iml.data.corpus.tokenizer import train_byte_level_bpe

    bench = Bench.open(arguments.input)
    # The training split unless told otherwise: merges learned from held-out text would leak it.
    entries = bench.files(arguments.split)
    examples = sum(entry.examples for entry in entries)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Reading examples", total=examples)

        # A generator: the library reads once and keeps counts of words, never the texts.
        def texts() -> Iterator[str]:
            """Source and answer of every row, moving the bar."""
            for entry in entries:
                for row in bench.rows(entry):
                    progress.advance(bar)
                    # Joined as in a corpus: else answers' first words are learned without their blank.
                    yield f"{row['src']} {row['tgt']}"

        train_byte_level_bpe(texts(), arguments.vocab_size, arguments.output)
    return examples


def run(arguments: argparse.Namespace) -> None:
    """Train and say from what."""
    examples = train(arguments)
    print(f"{arguments.output}: {arguments.vocab_size:,} entries learned from {examples:,} examples")


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    return run_command(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
