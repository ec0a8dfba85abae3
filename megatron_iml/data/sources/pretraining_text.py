"""Pretraining text for replay: documents without a source, every token of them a target.

What enters: `<folder>/**/*.jsonl` (or .json, .csv, .parquet) with a field `text`. What leaves: one `Task` of
benchmark "Pretraining", named by the folder.

    {"text": "A page.\\n\\nIts second paragraph."}  ->  source "", targets ("A page.\\n\\nIts second ...",)

A target that is longer than a row is dropped when rows are planned, so documents are cut here, at the last
line break or blank before `piece_characters`; a piece of 4,000 characters has about 1,000 tokens.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.tables import table_files, table_rows
from megatron_iml.data.text_files import as_text

BENCHMARK = "Pretraining"


def read(folder: Path, drops: Drops, *, field: str = "text", piece_characters: int = 4000) -> Iterator[Task]:
    """One task of all documents of a folder.

    Args:
        folder: anything above the files; its name is the task's.
        drops: where instances are counted.
        field: of a row that holds the text.
        piece_characters: longest piece of a document.

    Raises:
        ValueError: `piece_characters` below 1; nothing matches.
    """
    if piece_characters < 1:
        raise ValueError(f"pretraining_text: piece_characters is {piece_characters}; give 1 or more")
    paths = table_files(folder, "**/*", drops)
    pick = partial(_instances, paths, field, piece_characters)
    # One task, whatever the files: mixtures weigh replay as a whole.
    yield make_task(drops, BENCHMARK, folder.name, "Pretraining", pick)


def pieces(text: str, longest: int) -> Iterator[str]:
    """A text in pieces of at most `longest` characters, together the text but for blanks at the cuts."""
    while len(text) > longest:
        # A line's end before a blank, a blank before the middle of a word; never a piece of a few words.
        cuts = (text.rfind(mark, longest // 2, longest) for mark in ("\n\n", "\n", " "))
        # Text without a blank (Chinese, a long address) is cut in its middle.
        cut = next((cut for cut in cuts if cut > 0), longest)
        yield text[:cut]
        # Else the next piece would begin with the line break that this one ends before.
        text = text[cut:].lstrip()
    yield text


def _instances(paths: Sequence[Path], field: str, longest: int, counts: TaskCounts) -> Instances:
    for path in paths:
        for number, row in table_rows(path):
            text = as_text(row.get(field), counts)
            if text is None or not text.strip():
                yield f"{path.stem}-{number}", f"no text in {field}"
                continue
            # Blanks at the end of a long text would be a piece of their own, without a word in it.
            for index, piece in enumerate(pieces(text.rstrip(), longest)):
                if index:
                    counts.repaired["piece of a long document"] += 1
                # One instance: no split may put half of a page among its test rows.
                yield f"{path.stem}-{number}-{index}", Form("", (piece,), instance=f"{path.stem}-{number}")
