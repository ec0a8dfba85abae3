"""Show a document of a corpus, a row of a plan, totals of every task; or check both from end to end.

Sources are dim, targets green, what was cut from the left struck through, what a document shares with the one
before it blue, padding red.

Examples: python tools/preprocess/inspect_corpus.py --input corpus/train --tokenizer-model opt --document 7
          python tools/preprocess/inspect_corpus.py --input corpus/train --tokenizer-model opt \\
              --plan plan/train --row 0 --positions
          python tools/preprocess/inspect_corpus.py --input corpus/train --plan plan/train --totals
          python tools/preprocess/inspect_corpus.py --input corpus/train --plan plan/train --validate
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iml.command import command_parser, run_command

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from megatron_iml.data.corpus.folder import Corpus
    from megatron_iml.data.corpus.tokenizer import Tokenizer
    from megatron_iml.data.plan.folder import Plan

# One wrong byte early in an index makes everything behind it wrong.
FAULTS_SHOWN = 50


def parse_arguments() -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="corpus folder of one split")
    parser.add_argument("--tokenizer-model", type=Path, help="folder of vocabulary and merges, to show text")
    parser.add_argument("--plan", type=Path, help="plan folder")
    parser.add_argument(
        "--positions", action="store_true", help="with --row: slot, token, position, end and targets of each"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, help="number of a document: all its references")
    what.add_argument("--row", type=int, help="number of a row of --plan")
    what.add_argument("--totals", action="store_true", help="documents and tokens of every task")
    what.add_argument(
        "--validate", action="store_true", help="check the corpus, and the plan if there is one"
    )
    arguments = parser.parse_args()
    # None and not falsehood, here and below: 0 is a row and a document.
    if arguments.row is not None and arguments.plan is None:
        parser.error("--row needs --plan, the folder whose row it is")
    if (arguments.document, arguments.row) != (None, None) and arguments.tokenizer_model is None:
        parser.error("--document and --row need --tokenizer-model, to turn ids into text")
    if arguments.positions and arguments.row is None:
        parser.error("--positions needs --row: a document alone has no place in a row")
    return arguments


def load_tokenizer(folder: Path, corpus: "Corpus") -> "Tokenizer":
    """Return the tokenizer that the corpus was made with."""
    from megatron_iml.data.corpus.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    # Another tokenizer would decode every id to some text, and the text would mislead.
    if tokenizer.sha256 != corpus.tokenizer_sha256:
        raise ValueError(
            f"tokenizer {folder} has SHA-256 {tokenizer.sha256}, the corpus was made with "
            f"{corpus.tokenizer_sha256}; name that one"
        )
    return tokenizer


def document_text(
    corpus: "Corpus", tokenizer: "Tokenizer", document: int, reference: int, cut: int = 0, shared: int = 0
) -> "Text":
    """Return one document in colours; `cut` and `shared` count tokens from the left."""
    from rich.text import Text

    # [L], source and target end to end, the final </s> included.
    tokens, source_length = corpus.tokens(document, reference)
    task = next(record.name for record in corpus.task_records if document in record.documents)
    text = Text(
        f"[{document}.{reference} {task}, {source_length} + {len(tokens) - source_length} tokens"
        f"{f', {shared} shared with the one before' if shared else ''}]\n",
        "cyan",
    )
    # Shared tokens are counted from the cut on.
    stop_shared = cut + shared
    for start, stop, style in (
        (0, cut, "strike red"),
        (cut, stop_shared, "blue"),
        # Sharing may reach beyond the source, where candidates of one prompt begin alike.
        (stop_shared, max(source_length, stop_shared), "dim"),
        (max(source_length, stop_shared), len(tokens), "green"),
    ):
        # </s> is a special token and decodes to nothing: it is appended by hand below.
        text.append(tokenizer.decode(tokens[start:stop]), style)
    return text.append("</s>\n", "bold green")


def show_document(console: "Console", corpus: "Corpus", arguments: argparse.Namespace) -> None:
    """Print every reference of a document."""
    # Python's own -1 would be the last document, shown under a number that it has not.
    check_number("document", arguments.document, corpus.num_documents)
    tokenizer = load_tokenizer(arguments.tokenizer_model, corpus)
    for reference in range(corpus.num_references(arguments.document)):
        console.print(document_text(corpus, tokenizer, arguments.document, reference))


def show_row(console: "Console", corpus: "Corpus", plan: "Plan", arguments: argparse.Namespace) -> None:
    """Print the documents of a row, or its slots."""
    from megatron_iml.data.rows.loader import Loader

    check_number("row", arguments.row, plan.num_rows)
    tokenizer = load_tokenizer(arguments.tokenizer_model, corpus)
    # Through the trainer's own loader: what is shown is what a model gets.
    row = Loader(corpus, plan).row(arguments.row)
    layout = row.layout
    if arguments.positions:
        show_slots(console, tokenizer, row.tokens_T, layout.positions_T, layout.end_T, layout.num_real)
        pairs = zip(row.target_rows_M.tolist(), row.target_ids_M.tolist(), strict=True)
        console.print("targets  " + "  ".join(f"{slot}:{label}" for slot, label in pairs), soft_wrap=True)
    else:
        for entry in plan.entries(arguments.row):
            numbers = (int(entry[name]) for name in ("document", "reference", "cut", "shared"))
            console.print(document_text(corpus, tokenizer, *numbers))
    padding = plan.row_length - layout.num_real
    console.print(f"{layout.num_real} slots, {layout.num_targets} targets, [red]{padding} of padding[/red]")


def show_slots(
    console: "Console",
    tokenizer: "Tokenizer",
    tokens_T: "np.ndarray",
    positions_T: "np.ndarray",
    end_T: "np.ndarray",
    num_real: int,
) -> None:
    """Print a line for every slot that holds a token, and one for all padding."""
    from rich.table import Table
    from rich.text import Text

    table = Table("slot", "token", "text", "position", "end", box=None)
    # Token by token, whatever letters they cut: that is what the model reads.
    for slot in range(num_real):
        # Escaped, since a token may be half a letter or a line break.
        text = Text(ascii(tokenizer.decode(tokens_T[slot : slot + 1]))[1:-1])
        table.add_row(f"{slot}", f"{tokens_T[slot]}", text, f"{positions_T[slot]}", f"{end_T[slot]}")
    if num_real < len(tokens_T):
        table.add_row(f"{num_real}-{len(tokens_T) - 1}", "1", "padding", "0", "its own slot", style="red")
    console.print(table)


def show_totals(console: "Console", corpus: "Corpus", plan: "Plan | None") -> None:
    """Print what is stored of every task and, with a plan, what became of its draws."""
    from rich.table import Column, Table

    stored = ("documents", "tokens", "target tokens")
    planned = ("drawn", "packed", "truncated", "dropped", "planned tokens", "shared") if plan else ()
    table = Table(
        Column("task", overflow="fold"), *(Column(name, justify="right") for name in stored + planned)
    )
    rows = []
    for task in corpus.task_records:
        numbers = [len(task.documents), task.tokens, task.target_tokens]
        if plan:
            # None for a task that the plan leaves out: another level, or no draw.
            line = plan.ledger.get(task.name)
            numbers += (
                [line["drawn"], line["packed"], line["truncated"], sum(line["dropped"].values())]
                + [line["tokens"], line["shared_tokens"]]
                if line
                else [0] * len(planned)
            )
        rows.append(numbers)
        table.add_row(task.name, *(f"{number:,}" for number in numbers))
    table.add_section()
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*rows, strict=True)))
    console.print(table)


def validate(console: "Console", corpus: "Corpus", plan: "Plan | None") -> int:
    """Print what is wrong; exit code 1 if anything is."""
    from rich.text import Text

    from megatron_iml.data.corpus.validation import corpus_faults
    from megatron_iml.data.plan.validation import plan_faults

    checks = [(f"corpus {corpus.folder}", corpus_faults(corpus))]
    if plan:
        checks.append((f"plan {plan.folder}", plan_faults(plan, corpus)))
    failed = False
    # Lazily, for a broken shard may have millions of them.
    for what, found in checks:
        faults = list(islice(found, FAULTS_SHOWN))
        failed |= bool(faults)
        for fault in faults:
            # No markup: a task may be called anything.
            console.print(Text.assemble((what, "red"), f": {fault}"), soft_wrap=True)
        if not faults:
            console.print(f"{what}: valid", soft_wrap=True, highlight=False)
    return int(failed)


def check_number(what: str, number: int, count: int) -> None:
    """Refuse a number out of range."""
    if not 0 <= number < count:
        raise ValueError(f"no {what} {number}: there are {count}, numbered from 0")


def show(arguments: argparse.Namespace) -> int:
    """Print what is asked for and return the exit code."""
    from rich.console import Console

    from megatron_iml.data.corpus.folder import Corpus
    from megatron_iml.data.plan.folder import Plan
    from megatron_iml.data.rows.loader import Loader

    # Colours on a terminal, plain text in a pipe: rich tells the two apart.
    terminal = Console()
    # Columns of a table need room, and a pipe has no width.
    console = terminal if terminal.is_terminal else Console(width=max(160, terminal.width))
    # Maps the shards and reads no token, so --totals of 7 GB answers at once.
    corpus = Corpus.open(arguments.input)
    plan = Plan.open(arguments.plan) if arguments.plan else None
    if plan:
        Loader(corpus, plan)  # refuses a plan of another corpus
    # Only this has a status of its own; all that is shown is 0.
    if arguments.validate:
        return validate(console, corpus, plan)
    if arguments.totals:
        show_totals(console, corpus, plan)
    elif arguments.document is not None:
        show_document(console, corpus, arguments)
    elif plan:
        show_row(console, corpus, plan, arguments)
    return 0


def main() -> int:
    """Exit code 2 and one line for the user's mistakes, 1 for a corpus or plan that is not valid."""
    return run_command(lambda: show(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
