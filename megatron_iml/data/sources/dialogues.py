"""Dialogues as text without a source, turns joined by a newline: the paper's form of dialogue data.

What enters: tables whose rows list turns, under `dialogue`, `dialog`, `turns` or `utterances` (texts, or
objects with `text`), or ParlAI's text files. What leaves: one `Task` of benchmark "Dialogue", named by the
folder.

    {"dialog": [{"text": "Hi!"}, {"text": "Hello."}]}          ->  source "", targets ("Hi!\\nHello.",)
    "1 Hi!\\tHello.\\n2 How are you?\\tFine.\\n1 Next dialogue"  ->  "Hi!\\nHello.\\nHow are you?\\nFine."
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.form import Form, Instances, make_task
from megatron_iml.data.tables import KINDS, table_rows
from megatron_iml.data.text_files import source_files, text_lines

BENCHMARK = "Dialogue"
FIELDS = ("dialogue", "dialog", "turns", "utterances")
# ParlAI's fbdialog numbers the lines of a dialogue from 1; "your persona:" lines describe, they speak not.
NUMBERED = re.compile(r"(\d+) (.*)", re.DOTALL)
PERSONA = ("your persona:", "partner's persona:")


def read(folder: Path, drops: Drops) -> Iterator[Task]:
    """One task of all dialogues of a folder.

    Raises:
        ValueError: a line of a text file has no number; nothing matches.
    """
    files = source_files(folder, "**/*.*", drops)
    paths = [path for path in files if path.suffix in KINDS or path.suffix == ".txt"]
    if not paths:
        raise ValueError(f"{folder}: no table and no .txt file; the reader or the folder is the wrong one")
    yield make_task(drops, BENCHMARK, folder.name, "Dialogue", partial(_instances, paths))


def _instances(paths: Sequence[Path], counts: TaskCounts) -> Instances:
    for path in paths:
        dialogues = _numbered(path) if path.suffix == ".txt" else _listed(path)
        for number, turns in dialogues:
            id = f"{path.stem}-{number}"
            if len(turns) < 2:
                yield id, "fewer than two turns"
            else:
                # All of it is target: the paper trained on dialogues as on pretraining text.
                yield id, Form("", ("\n".join(turns),))


def _listed(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, row in table_rows(path):
        # Whichever comes first of the four; a row without any has no turns, and is counted so.
        field = next((field for field in FIELDS if isinstance(row.get(field), list)), None)
        turns = row[field] if field is not None else []
        texts = [turn.get("text") if isinstance(turn, dict) else turn for turn in turns]
        yield number, [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _numbered(path: Path) -> Iterator[tuple[int, list[str]]]:
    turns: list[str] = []
    start = 1
    for number, line in text_lines(path):
        if not line.strip():
            continue
        found = NUMBERED.match(line)
        if found is None:
            raise ValueError(
                f"{path}:{number}: no number before the text; give ParlAI's lines `1 text<TAB>reply`"
            )
        # A number 1 is the only sign of where a dialogue ends.
        if found[1] == "1" and turns:
            yield start, turns
            turns, start = [], number
        # Text and reply; what follows are rewards and candidates.
        spoken = found[2].split("\t")[:2]
        turns += [text.strip() for text in spoken if text.strip() and not text.startswith(PERSONA)]
    if turns:
        yield start, turns
