"""GSM8K in its official JSON Lines.

What enters: `<folder>/**/train.jsonl` and `test.jsonl` with `question` and `answer`. What leaves: the tasks
`gsm8k_train` and `gsm8k_test`, each part a task of its own, so that training on one never takes in the other.

    answer "48/2 = <<48/2=24>>24 clips.\\n#### 24"  ->  target "48/2 = 24 clips. The answer is 24"

The calculator annotations <<...>> go; the final answer stands after "#### ".
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops, TaskCounts
from megatron_iml.data.sources.reasoning_form import (
    BENCHMARK,
    CATEGORY,
    QUESTION_INSTRUCTION,
    reasoning_source,
    reasoning_target,
)
from megatron_iml.data.text_files import as_text, json_lines, source_files

# For a calculator that GSM8K's authors let the model call; nothing here answers the call.
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
ANSWER_MARK = "####"


def read(folder: Path, drops: Drops, *, parts: Sequence[str] = ("train",)) -> Iterator[Task]:
    """Tasks of the GSM8K folder.

    Args:
        folder: the repository or a folder inside it.
        drops: where instances are counted.
        parts: file stems, `train` and `test`; training data alone unless asked.

    Raises:
        ValueError: a part has no file or more than one; a line is not JSON.
    """
    for part in parts:
        paths = source_files(folder, f"**/{part}.jsonl", drops)
        # Two copies would be two tasks of one name; which was meant cannot be guessed.
        if len(paths) > 1:
            raise ValueError(
                f"{folder}: {len(paths)} files {part}.jsonl; give the folder that holds the one meant"
            )
        for path in paths:
            # The part is in the name, so that `held_out_tasks` can name the test questions alone.
            name = f"gsm8k_{part}"
            examples = partial(_examples, path, part, drops.task(BENCHMARK, name))
            source = "gsm8k"
            yield Task(name, BENCHMARK, CATEGORY, "rouge_l", examples, data_sources=(source,), parent=source)


def _examples(path: Path, part: str, counts: TaskCounts) -> Iterator[Example]:
    for number, row in json_lines(path):
        counts.read += 1
        question, solution = as_text(row.get("question"), counts), as_text(row.get("answer"), counts)
        if question is None or solution is None:
            counts.drop("question or answer is not text")
            continue
        # From the right: only the last line holds the final answer.
        rationale, mark, answer = CALCULATOR_ANNOTATION.sub("", solution).rpartition(ANSWER_MARK)
        if not mark or not answer.strip():
            counts.drop(f"no answer after {ANSWER_MARK}")
            continue
        yield Example(
            id=f"{part}-{number}",
            task=f"gsm8k_{part}",
            benchmark=BENCHMARK,
            category=CATEGORY,
            source=reasoning_source(question),
            targets=(reasoning_target(rationale, answer),),
            instruction=QUESTION_INSTRUCTION,
        )
