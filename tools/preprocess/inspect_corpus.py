"""Show a document of a corpus, or a row of a plan, in the terminal: source dim, targets green, padding red.

Examples: python tools/preprocess/inspect_corpus.py --corpus corpus --tokenizer-model opt --document 7
          python tools/preprocess/inspect_corpus.py --corpus corpus --tokenizer-model opt --plan plan --row 0
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from megatron_iml.data.corpus import Corpus
    from megatron_iml.data.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="corpus folder of one split")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="folder of vocabulary and merges")
    parser.add_argument("--plan", type=Path, help="plan folder, for --row")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, help="number of a document: all its references")
    what.add_argument("--row", type=int, help="number of a row of --plan")
    arguments = parser.parse_args()
    if (arguments.row is None) != (arguments.plan is None):
        parser.error("--row and --plan go together")
    return arguments


def document_text(
    corpus: "Corpus", tokenizer: "Tokenizer", document: int, reference: int, cut: int = 0
) -> "Text":
    """Return one document in colours, with what was cut from its left struck through."""
    from rich.text import Text

    tokens, source_length = corpus.tokens(document, reference)
    task = next(record.name for record in corpus.task_records if document in record.documents)
    text = Text(
        f"[{document}.{reference} {task}, {source_length} + {len(tokens) - source_length} tokens]\n", "cyan"
    )
    text.append(tokenizer.decode(tokens[:cut]), "strike red")
    text.append(tokenizer.decode(tokens[cut:source_length]), "dim")
    text.append(tokenizer.decode(tokens[source_length:]), "green")
    text.append("</s>\n", "bold green")
    return text


def show(arguments: argparse.Namespace) -> None:
    """Print the document or the row."""
    from rich.console import Console

    from megatron_iml.data.corpus import Corpus
    from megatron_iml.data.loader import Loader
    from megatron_iml.data.plan import Plan
    from megatron_iml.data.tokenizer import Tokenizer

    console = Console()
    corpus = Corpus.open(arguments.corpus)
    tokenizer = Tokenizer.load(arguments.tokenizer_model)
    # Another tokenizer would decode every id to some text, and the text would mislead.
    if tokenizer.sha256 != corpus.tokenizer_sha256:
        raise ValueError(
            f"tokenizer {arguments.tokenizer_model} has SHA-256 {tokenizer.sha256}, the corpus was made with "
            f"{corpus.tokenizer_sha256}; name that one"
        )
    if arguments.document is not None:
        check_number("document", arguments.document, corpus.num_documents)
        for reference in range(corpus.num_references(arguments.document)):
            console.print(document_text(corpus, tokenizer, arguments.document, reference))
        return
    plan = Plan.open(arguments.plan)
    check_number("row", arguments.row, plan.num_rows)
    layout = Loader(corpus, plan).layout(arguments.row)
    for entry in plan.entries(arguments.row):
        document, reference, cut = int(entry["document"]), int(entry["reference"]), int(entry["cut"])
        console.print(document_text(corpus, tokenizer, document, reference, cut))
    padding = plan.row_length - layout.num_real
    console.print(f"{layout.num_real} slots, {layout.num_targets} targets, [red]{padding} of padding[/red]")


def check_number(what: str, number: int, count: int) -> None:
    """Refuse a number out of range."""
    if not 0 <= number < count:
        raise ValueError(f"no {what} {number}: there are {count}, numbered from 0")


def main() -> int:
    """Exit code 2 and one line for the user's mistakes."""
    arguments = parse_arguments()
    try:
        show(arguments)
    # OSError: a folder where a file belongs, or no right to write, is the user's to mend as well.
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
